"""Five tasks of GLUE as one, each with classes of its own: several tasks in one adapter.

`mixture` has a text, or two, and one of eleven classes: two each of SST-2, CoLA, MRPC and QNLI,
three of MNLI. Which task a row is of shows from its texts alone.

    python -m benchmarks.derive_mixture DATA OUT

DATA holds sst2, cola, mrpc, qnli and mnli as in GLUE, each as train.parquet: all rows are
drawn of it.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TASKS = {
    "sst2": ("sentence", None, 2),
    "cola": ("sentence", None, 2),
    "mrpc": ("sentence1", "sentence2", 2),
    "qnli": ("question", "sentence", 2),
    "mnli": ("premise", "hypothesis", 3),
}
"""By folder: the columns of the texts, and the number of classes."""
ROWS = {"train": 2000, "validation": 100, "test": 400}
"""Rows of each task by split, drawn by a fixed seed."""


def main() -> None:
    """Write the mixture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in ROWS}
    first_class = 0
    for task, (first, second, classes) in TASKS.items():
        rows = pq.read_table(options.data / task / "train.parquet").to_pylist()
        random.Random(0).shuffle(rows)
        for split, count in ROWS.items():
            splits[split] += [
                {
                    "text": row[first],
                    "text_pair": row[second] if second else "",
                    "label": first_class + row["label"],
                }
                for row in rows[:count]
            ]
            rows = rows[count:]
        first_class += classes
    folder = options.out / "mixture"
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        random.Random(0).shuffle(rows)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
        print(f"mixture, {split}: {len(rows)} rows of {first_class} classes")


if __name__ == "__main__":
    main()
