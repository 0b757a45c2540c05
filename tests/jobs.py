"""A tiny classifier on disk and data that it can learn, for tests of the training job."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from dynlora.cli.job_options import job_of
from dynlora.cli.output import Output
from dynlora.cli.train import COMMAND
from dynlora.train.config import JobConfig
from dynlora.train.config_file import make_job
from dynlora.train.data.splits import RawSplit
from dynlora.train.job import train_briefly

WORDS = ("red", "green", "blue", "round", "square", "big", "small", "old", "new", "cat", "dog")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
MAX_POSITIONS = 32
HIDDEN = 16
MINIMAL = {"output": "out", "model": {"name": "m"}, "data": {"name": "d"}}


def snapshot(folder: Path) -> dict[str, bytes | None] | None:
    """Return everything in a folder; None if there is no folder."""
    if not folder.exists():
        return None
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def missing(text: str, *told: str) -> list[str]:
    """Return the parts that a text lacks; a bar separates the parts of `told`."""
    return [part for each in told for part in each.split(" | ") if part not in text]


def measure_here(patch: pytest.MonkeyPatch) -> None:
    """Measure peaks in this process, because starting one for each of four methods is slow."""

    def run(command: object, **given: Any) -> SimpleNamespace:
        peak = json.dumps(train_briefly(pickle.loads(given["input"])))
        return SimpleNamespace(returncode=0, stdout=peak.encode(), stderr=b"")

    patch.setattr("dynlora.train.plan.subprocess", SimpleNamespace(run=run))


def parse_job(*words: object) -> JobConfig:
    """Return the job of the words after `dynlora train`."""
    context = COMMAND.make_context("train", [str(word) for word in words])
    config = job_of(SimpleNamespace(**context.params), Output(as_json=False, quiet=True))
    assert config is not None
    return config


def minimal_job(**sections: Any) -> JobConfig:
    """Return the smallest job with these sections."""
    return make_job(MINIMAL | sections)


def split_of(**columns: Any) -> RawSplit:
    """Return a training split of columns."""
    table = pa.table(columns)
    numbers = range(table.num_rows)
    return RawSplit(name="training", source="here", table=table, row_numbers=numbers)


def save_model(folder: Path, *, seed: int = 0, hidden: int = HIDDEN, labels: int = 2) -> Path:
    """Save a random BERT of two blocks with dropout, and a tokenizer of words."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
        num_labels=labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, **special: str | None) -> None:
    """Save a tokenizer that takes each of `WORDS` as a token."""
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokens: dict[str, Any] = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    } | special
    given = {key: token for key, token in tokens.items() if token is not None}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **given,
    ).save_pretrained(folder)


def make_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows whose label is 1 where the text names red."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length = int(torch.randint(2, 7, (1,), generator=generator))
        picks = torch.randint(1, len(WORDS), (length,), generator=generator).tolist()
        label = number % 2
        words = [WORDS[pick] for pick in picks] + ["red"] * label
        rows.append({"text": " ".join(words), "other": WORDS[picks[0]], "label": label})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows in the format that the file's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    if path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
        return path
    table = pa.Table.from_pylist(list(rows))
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.parquet.write_table(table, path)
    return path


def write_data(
    folder: Path, *, ending: str = ".jsonl", train: int = 48, validation: int = 16
) -> Path:
    """Write a training and a validation split."""
    write_rows(folder / f"train{ending}", make_rows(train, seed=1))
    write_rows(folder / f"validation{ending}", make_rows(validation, seed=2))
    return folder


def write_job(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a job's configuration."""
    path.write_text(yaml.safe_dump(dict(values)))
    return path


def job_values(model: Path, data: Path, output: Path) -> dict[str, Any]:
    """Return the configuration of a job of 12 steps in two epochs, whose ranks can move."""
    return {
        "output": str(output),
        "model": {"path": str(model)},
        "data": {"path": str(data), "max_length": 16},
        "lora": {"r": 2, "lora_alpha": 4},
        "dynamic": {"events": 3, "first_event": 0.25, "last_event": 0.75},
        "training": {
            "epochs": 2,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "bf16": False,
            "save": "steps",
            "save_steps": 5,
            "logging_steps": 1,
        },
    }
