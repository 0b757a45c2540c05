"""Tasks that ask for many things at once, derived from e2e_nlg: which slots a text tells, and what.

A text of e2e_nlg describes a restaurant, and its meaning representation lists the slots that it
tells with their values. `e2e_slots` asks which of the eight slots are told; `e2e_values` asks which
of the 26 values that are no names. Both are multi-label classification. Splits stay what they were.

    python -m benchmarks.derive_tasks DATA OUT

DATA holds e2e_nlg/{train,validation,test}.parquet with the columns `mr` and `ref`.
"""

import argparse
import random
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "validation", "test")
SLOTS = (
    "area", "customer rating", "eatType", "familyFriendly", "food", "name", "near", "priceRange",
)  # fmt: skip
NAMES = ("name", "near")
"""Slots whose values are names, which a text repeats: no task for a model."""
ROWS = 4000
"""Most rows of a split, drawn by a fixed seed."""


def main() -> None:
    """Write both tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    rows = {split: _sample(options.data / "e2e_nlg" / f"{split}.parquet") for split in SPLITS}
    slots = {slot: number for number, slot in enumerate(SLOTS)}
    told = {
        pair for found in rows.values() for row in found for pair in read_meaning(row["mr"]).items()
    }
    values = sorted(f"{slot}={value}" for slot, value in told if slot not in NAMES)
    numbers = {value: number for number, value in enumerate(values)}
    for split, found in rows.items():
        meanings = [read_meaning(row["mr"]) for row in found]
        texts = [row["ref"] for row in found]
        asked = [sorted(slots[slot] for slot in meaning) for meaning in meanings]
        _write(options.out / "e2e_slots", split, texts, asked)
        asked = [
            sorted(numbers[f"{s}={v}"] for s, v in meaning.items() if s not in NAMES)
            for meaning in meanings
        ]
        _write(options.out / "e2e_values", split, texts, asked)
    print(f"{len(slots)} slots, {len(numbers)} values")
    for split, found in rows.items():
        told_by_each = fmean(len(read_meaning(row["mr"])) for row in found)
        print(f"{split}: {len(found)} rows, which tell {told_by_each:.2f} slots each")


def read_meaning(text: str) -> Mapping[str, str]:
    """Return value by slot of a meaning representation: `name[The Eagle], food[French]`."""
    return dict(re.findall(r"([A-Za-z][A-Za-z ]*)\[([^\]]*)\]", text))


def _sample(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = pq.read_table(path).to_pylist()
    random.Random(0).shuffle(rows)
    return rows[:ROWS]


def _write(folder: Path, split: str, texts: list[str], labels: list[list[int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), folder / f"{split}.parquet")


if __name__ == "__main__":
    main()
