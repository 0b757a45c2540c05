"""`dynlora compare`: finished runs side by side, and the refused inputs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dynlora.cli.main import main
from tests.cli.test_report import refused
from tests.unit.report.runs import block_names, make_events, run_values, write_run

Train = Callable[..., int]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return write_run(tmp_path / "one", events=make_events(block_names(2), [10]))


@pytest.mark.usefixtures("moving")
def test_a_dynamic_run_and_plain_lora_are_compared_layer_by_layer(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {method: tmp_path / method for method in ("dynamic", "lora")}
    for method, folder in folders.items():
        assert train("--method", method, "--output", folder) == 0
    capsys.readouterr()
    assert main(["compare", *map(str, folders.values()), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    runs = [json.loads((folder / "run.json").read_text()) for folder in folders.values()]
    assert [run["metrics_after"] for run in found["runs"]] == [run["metrics_after"] for run in runs]
    assert {row["layer"]: row["ranks"] for row in found["ranks"]} == {
        layer: [rank, 2] for layer, rank in runs[0]["final_ranks"].items()
    }
    assert found["configuration"] == {"method": ["dynamic", "lora"]}
    assert found["warnings"] == []


def test_runs_may_be_three_or_twice_the_same_and_other_seeds_are_a_warning(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = make_events(block_names(2), [10, 20])
    two = write_run(tmp_path / "two", events=events, run=run_values(seed=1))
    assert main(["compare", str(one), str(two)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "ranks that differ most" in printed.out
    assert "not comparable, other seeds: 0 against 1" in printed.out
    assert max(map(len, printed.out.splitlines())) <= 100
    assert main(["compare", str(one), str(two), str(one), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"]] == [str(one), str(two), str(one)]


@pytest.mark.parametrize(
    ("status", "method", "saved", "advice"),
    [
        ("running", "lora", True, "--training.resume latest"),
        ("interrupted", "lora", False, "--overwrite true"),
        ("failed", "adalora", True, "--overwrite true"),
    ],
)
def test_an_unfinished_run_is_refused_with_the_command_that_finishes_it(
    one: Path,
    tmp_path: Path,
    status: str,
    method: str,
    saved: bool,
    advice: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = run_values(status=status, method=method, steps=None)
    root = write_run(tmp_path / "half", run=values)
    checkpoint = root / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    if saved:
        (checkpoint / "job.json").write_text("{}")
    assert main(["compare", str(one), str(root)]) == 2
    line = refused(capsys)
    assert f"must be finished, got {root}" in line
    assert "after 100 steps" in line
    assert f"`dynlora train {root / 'config.yaml'} --output {root} {advice}`" in line


def test_fewer_than_two_runs_and_other_folders_are_refused(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, told in {
        (): "at least two runs, got 0: give another",
        (one,): f"at least two runs, got 1, {one}: give another",
        (one, tmp_path): "a folder without one",
        (tmp_path, one): "a folder without one",
    }.items():
        assert main(["compare", *map(str, arguments)]) == 2
        assert told in refused(capsys)
