"""The scripts of `benchmarks` beside the harness: what they use of dynlora is still there."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.recovery import parts

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted([*FOLDER.glob("*.py"), *FOLDER.glob("engines/*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_names_that_exist(script):
    """Without running it, because it may need packages that only its user installs."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dynlora":
            module = import_module(str(node.module))
            for name in node.names:
                if not hasattr(module, name.name):
                    import_module(f"{node.module}.{name.name}")


@pytest.mark.parametrize("change", parts.CHANGES)
def test_every_part_of_the_method_can_be_left_out(change):
    values = {"lora": {"r": 2}, "dynamic": {}}
    with parts._changed(change, values, {"a": 1}, {"a": 2}):
        pass
    assert values["lora"] == {"r": 2}
