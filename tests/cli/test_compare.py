"""`dynlora compare`: finished runs side by side, and what it refuses."""

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


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "two", events=make_events(block_names(2), [10, 20]), run=run_values(seed=1)
    )


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


def test_the_table_shows_both_and_warns_of_other_seeds(
    one: Path, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(one), str(two)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "ranks that differ most" in said.out
    assert "not comparable, other seeds: 0 against 1" in said.out
    assert max(map(len, said.out.splitlines())) <= 100


def test_three_runs_and_a_run_with_itself_are_fine(
    one: Path, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(one), str(two), str(one), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"]] == [str(one), str(two), str(one)]
    assert main(["compare", str(one), str(one), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["configuration"], found["warnings"]) == ({}, [])
    assert {row["difference"] for row in found["ranks"]} == {0}


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_no_run_is_refused(
    one: Path, tmp_path: Path, order: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *[str(one), str(tmp_path)][::order]]) == 2
    assert "a folder without one" in refused(capsys)


@pytest.mark.parametrize(
    ("method", "saved", "advice"),
    [
        ("lora", True, "--training.resume latest"),
        ("lora", False, "--overwrite true"),
        ("adalora", True, "--overwrite true"),
    ],
)
@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_is_refused_by_name(
    one: Path,
    tmp_path: Path,
    status: str,
    method: str,
    saved: bool,
    advice: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = write_run(tmp_path / "half", run=run_values(status=status, method=method))
    checkpoint = root / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    if saved:
        (checkpoint / "job.json").write_text("{}")
    assert main(["compare", str(one), str(root)]) == 2
    line = refused(capsys)
    assert "must be finished" in line
    assert str(root) in line
    assert f"`dynlora train {root / 'config.yaml'} --output {root} {advice}`" in line


def test_one_run_alone_is_refused(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(one)]) == 2
    assert f"at least two runs, got 1, {one}: give another" in refused(capsys)
    assert main(["compare"]) == 2
    assert "at least two runs, got 0: give another" in refused(capsys)
