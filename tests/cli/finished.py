"""Finished runs of tiny jobs, and what stock libraries say about them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, BertForSequenceClassification

from dynlora.cli.main import main
from tests.jobs import job_values, write_job


def finish(
    folder: Path, model: Path, data: Path, *options: object, **values: Mapping[str, Any]
) -> Path:
    """Train a job to its end and return its folder."""
    config = write_job(folder / "job.yaml", job_values(model, data, folder / "run") | values)
    assert main(["train", str(config), "--quiet", *map(str, options)]) == 0
    return folder / "run"


def stock_logits(run: Path, model: Path, texts: Sequence[str]) -> torch.Tensor:
    """Return logits ``(texts, classes)`` by PEFT and transformers alone, one text at a time."""
    if (run / "model").is_dir():
        loaded = BertForSequenceClassification.from_pretrained(run / "model").eval()
    else:
        base = BertForSequenceClassification.from_pretrained(model)
        loaded = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        rows = [loaded(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows)


def read_json(path: Path) -> Any:
    """Return a JSON file's content."""
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
