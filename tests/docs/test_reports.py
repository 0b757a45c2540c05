"""The commands in docs/reports.md run as they stand, on runs and a study where they look."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.harness.command import main as harness
from dynlora.cli.main import main
from tests.harness.records import invented_study, write
from tests.unit.report.runs import block_names, make_events, run_values, write_run

PAGE = Path(__file__).parents[2] / "docs" / "reports.md"
LINES = [
    line
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
]
STUDY = invented_study(budgets=(8,), seeds=2, blocks=1)
COMMANDS = [line for line in LINES if not line.startswith("dynlora train ")]
HARNESS = "python -m benchmarks "


def test_there_are_commands_of_both_verbs_and_the_harness():
    starts = {line.split(" runs/")[0] for line in COMMANDS}
    assert starts >= {"dynlora report", "dynlora compare", f"{HARNESS}report"}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_runs(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = block_names(2)
    write_run(tmp_path / "runs" / "quickstart", events=make_events(names, [10]))
    lora = run_values(method="lora", final_ranks=dict.fromkeys(names, 8))
    write_run(tmp_path / "runs" / "quickstart-lora", run=lora)
    write(tmp_path / "benchmarks" / "results", *STUDY)
    if line.startswith(HARNESS):
        assert harness(shlex.split(line.removeprefix(HARNESS))) == 0
    else:
        assert main(shlex.split(line)[1:]) == 0
