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
    "`uniform`, scale doubled": "doubled",
    "`uniform`, scale halved": "halved",
    "no adapter": "none",
}


def row(title):
    cells = re.search(rf"^\| {re.escape(title)} \|(.*)\|$", TEXT, re.MULTILINE)
    assert cells, title
    return [cell.strip() for cell in cells[1].split("|")]


@pytest.mark.parametrize("title", FORMS)
def test_the_table_has_the_measured_figures(title):
    measured = [RESULTS["engines"][name][FORMS[title]] for name in ("vllm", "llamacpp")]
    assert row(title) == [f"{m['equal']}, {m['logprob_difference']:.0e}" for m in measured]


def test_the_result_is_a_pass_that_a_wrong_scale_fails():
    assert RESULTS["prompts"] == 20
    for engine in RESULTS["engines"].values():
        assert engine["passed"]
        assert engine["uniform"]["equal"] >= 19
        assert all(d["near_tie"] for d in engine["uniform"]["differences"])
        assert not any(engine[form]["passed"] for form in ("doubled", "halved", "none"))


def test_each_block_of_python_parses_and_imports_its_engine():
    packages = {"vllm": "vllm", "llamacpp": "xllamacpp"}
    for engine, code in python_blocks().items():
        assert re.search(rf"^(import|from) {packages[engine]}\b", code, re.MULTILINE)
        ast.parse(code)
