"""docs/serving.md: its table has the recorded figures, and its code parses."""

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks.engines.documented import DOCUMENT, python_blocks

ROOT = Path(__file__).parent.parent.parent
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "engines.json").read_text())
TEXT = DOCUMENT.read_text(encoding="utf-8")
FORMS = {
    "base model alone": "base_model_alone",
    "`uniform`": "uniform",
    "as trained (`native`)": "native",
    "switched by request": "switched",
    "8-bit weights": "int8",
    "`uniform`, scale doubled": "doubled",
}
ENGINES = {
    "vLLM": "vllm",
    "llama.cpp": "llamacpp",
    "MLX-LM": "mlx",
    "ONNX Runtime": "onnx",
    "ExecuTorch": "executorch",
}


def row(title):
    cells = re.search(rf"^\| {re.escape(title)} \|(.*)\|$", TEXT, re.MULTILINE)
    assert cells, title
    return [cell.strip() for cell in cells[1].split("|")]


@pytest.mark.parametrize("title", FORMS)
def test_the_table_has_the_measured_figures(title):
    engines = [ENGINES[name] for name in row("adapter")]
    assert engines == list(RESULTS["engines"])
    measured = [RESULTS["engines"][name].get(FORMS[title]) for name in engines]
    assert row(title) == [
        f"{m['equal']}, {m['logprob_difference']:.0e}" if m else "–" for m in measured
    ]


def test_the_memory_of_vllms_adapters_is_the_measured_one():
    slots = RESULTS["engines"]["vllm"]["measured"]["bytes_per_adapter_slot"]
    told = [f"{slots[rank] / 1e6:.0f} MB" for rank in ("32", "256")]
    assert "{} per adapter at `--max-lora-rank` 32, and {} at 256".format(*told) in TEXT


def test_the_result_is_a_pass_that_a_wrong_scale_fails():
    assert RESULTS["prompts"] == 20
    for engine in RESULTS["engines"].values():
        assert engine["passed"]
        assert engine["uniform"]["equal"] >= 19
        assert all(d["near_tie"] for d in engine["uniform"]["differences"])
        broken = [engine[form] for form in ("doubled", "halved", "none") if form in engine]
        assert broken
        assert not any(form["passed"] for form in broken)


def test_eight_bits_per_weight_stay_within_their_tolerance():
    found = RESULTS["engines"]["onnx"]["int8"]
    assert found["logprob_difference"] <= 0.1
    assert all(difference["gap"] <= 0.1 for difference in found["differences"])


def test_each_engine_in_python_has_a_block_that_parses():
    blocks = python_blocks()
    assert blocks.keys() == {"vllm", "llamacpp", "mlx", "onnx"}
    for code in blocks.values():
        ast.parse(code)
