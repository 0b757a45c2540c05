"""The commands in docs/reports.md run as they stand, on runs and a study where they look."""

import re
import shlex
from pathlib import Path

import pytest

from dynlora.cli.main import main
from tests.unit.bench.report.records import invented_study, write
from tests.unit.report.runs import block_names, make_events, run_values, write_run

PAGE = Path(__file__).parents[2] / "docs" / "reports.md"
LINES = [
    line
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
]
STUDY = invented_study(budgets=(8,), seeds=2, blocks=1)
COMMANDS = [line for line in LINES if not line.startswith("dynlora train ")]


def test_there_are_commands_of_both_verbs():
    assert {shlex.split(line)[1] for line in COMMANDS} == {"report", "compare", "bench"}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_runs(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = block_names(2)
    write_run(tmp_path / "runs" / "quickstart", events=make_events(names, [10]))
    lora = run_values(method="lora", final_ranks=dict.fromkeys(names, 8))
    write_run(tmp_path / "runs" / "quickstart-lora", run=lora)
    write(tmp_path / "benchmarks" / "results" / "first", *STUDY)
    if "--check" in line:
        assert main(["bench", "report"]) == 0
    assert main(shlex.split(line)[1:]) == 0
