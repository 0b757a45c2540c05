"""Presets and metrics of `method: dynamic`, through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dynlora import DynamicLoraConfig
from dynlora.cli.main import main
from dynlora.train.config_file import read_job
from tests.jobs import job_values, write_job


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]


@pytest.fixture
def paper(tmp_path: Path, model: Path, data: Path, output: Path) -> Path:
    """Return the configuration of a job of 12 steps with the paper's preset and one key on top."""
    values = job_values(model, data, output) | {"dynamic": {"preset": "paper", "events": 6}}
    return write_job(tmp_path / "paper.yaml", values)


@pytest.mark.usefixtures("moving")
def test_a_run_with_a_preset_leaves_a_complete_configuration(paper: Path, output: Path) -> None:
    assert main(["train", str(paper)]) == 0
    expected = DynamicLoraConfig.from_preset("paper", events=6)
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert "preset" not in written["dynamic"]
    assert written["dynamic"].keys() == set(expected.__slots__)
    assert read_job(output / "config.yaml").dynamic == expected
    whole = weights(output)
    shutil.rmtree(output / "checkpoints" / "checkpoint-12")
    assert main(["train", str(output / "config.yaml"), "--training.resume", "latest"]) == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(output).items())


@pytest.mark.usefixtures("moving")
def test_the_papers_preset_moves_weights_and_ranks_through_the_whole_run(
    paper: Path, output: Path
) -> None:
    assert main(["train", str(paper), "--dynamic.shrink_tolerance", "1"]) == 0
    found = events(output)
    assert [event["step"] for event in found] == [1, 3, 5, 7, 9, 11]
    layers = found[-1]["layers"].values()
    assert len({layer["weight"] for layer in layers}) > 3
    assert len({layer["rank_after"] for layer in layers}) > 1
    # Shares are cost times score times variance, and nothing else: a rank costs 32 or 48.
    costs = [layer["share"] / (layer["score"] * layer["variance"]) for layer in layers]
    assert {round(cost / min(costs), 3) for cost in costs} == {1.0, 1.5}


@pytest.mark.parametrize("metric", ["fisher", "magnitude", "attention_entropy"])
@pytest.mark.usefixtures("moving")
def test_every_metric_can_be_chosen(
    tmp_path: Path, model: Path, data: Path, output: Path, metric: str
) -> None:
    job = write_job(tmp_path / "job.yaml", job_values(model, data, output))
    assert main(["train", str(job), "--dynamic.importance", metric]) == 0
    scores = {name: layer["score"] for name, layer in events(output)[-1]["layers"].items()}
    known = [score for score in scores.values() if score is not None]
    assert len(set(known)) > 1
    outside = {name for name, score in scores.items() if score is None}
    assert outside == ({"bert.pooler.dense"} if metric == "attention_entropy" else set())
