"""`python -m benchmarks STUDY` from end to end: runs, records, stops, and what it refuses."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import benchmarks.harness.command as module
from benchmarks.harness.assignment import Outcome
from benchmarks.harness.command import main
from benchmarks.harness.execute import execute
from benchmarks.harness.records import RecordFiles
from benchmarks.harness.report.results import read_result
from dynlora.cli.main import main as dynlora
from tests.harness.studies import TUNE, StandIn, completed, write_study
from tests.jobs import save_model, snapshot, write_data
from tests.processes import process_group, run_in_group

ROOT = Path(__file__).parents[2]
Bench = Callable[..., int]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and rows."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_data(folder / "rows")
    return folder


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Let a stand-in do the runs, and return it."""
    stand_in = StandIn()
    monkeypatch.setattr(module, "_executor", lambda given: (stand_in, given.workers or 1))
    return stand_in


@pytest.fixture
def here(executor: StandIn, tmp_path: Path) -> StandIn:
    """Let runs be done in this process."""
    workspace = tmp_path / "work"
    workspace.mkdir()
    executor.become = lambda given: execute(replace(given, workspace=workspace))
    return executor


@pytest.fixture
def bench(tmp_path: Path, world: Path) -> Bench:
    """Return a runner of the harness on a small study; it returns the exit code."""

    def run(*options: object, **changes: Any) -> int:
        study = write_study(tmp_path, **changes)
        places = ["--data", str(world), "--models", str(world)]
        return main([str(study), *places, *map(str, options)])

    return run


def records(folder: Path) -> list[dict[str, Any]]:
    found = RecordFiles(folder / "results", "small").read()
    return sorted(found, key=lambda record: (record["method"], record["key"]))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that says what is wrong."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert captured.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in captured.err
    return lines[0].removeprefix("error: ")


def test_a_study_leaves_a_record_of_every_run(bench, here, tmp_path, capsys):
    assert bench("--keep-runs", tmp_path / "kept", seeds=[0]) == 0
    told = capsys.readouterr()
    found = {record["method"]: record for record in records(tmp_path)}
    assert found.keys() == {"lora", "dynamic"}
    for method, record in found.items():
        assert read_result(tmp_path, record).scores, "a report can be written"
        assert (record["status"], record["kind"]) == ("completed", "final")
        test, loss = record["test"], record["validation"]["loss"]
        assert f"tiny/rows/{method}/r2/s0: validation accuracy" in told.err
        assert f"loss {loss:.4f}; test accuracy {test['accuracy']:.4f}" in told.err
    assert "small 2 of 2: " in told.err
    assert "2 completed; 0 were there before" in told.out
    assert list((tmp_path / "work").iterdir()) == []
    assert len(here.asked) == 2
    for run in (tmp_path / "kept").rglob("run.json"):
        assert dynlora(["inspect", str(run.parent / "adapter"), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("changes", "done", "missing"),
    [
        ({}, "completed", "to do"),
        ({"tune": TUNE}, "completed, if its tuning stays", "to do; 0 of 3 trials are there"),
    ],
)
def test_a_dry_run_lists_the_state_of_every_run_and_writes_nothing(
    bench, executor, tmp_path, capsys, changes, done, missing
):
    assert bench("--dry-run", **changes) == 0
    assert "tiny/rows/dynamic/r2/s1" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert bench("--only", "*/lora/*/s0", "--only", "*/lora/*/s1", "--json", **changes) == 0
    values = json.loads(capsys.readouterr().out)
    kinds = [(run["kind"], run["status"], run["was_there"]) for run in values["runs"]]
    trials = [("trial", "completed", False)] * (3 if changes else 0)
    assert kinds == [*trials, *[("final", "completed", False)] * 2]
    assert {run["key"] for run in values["runs"]} == {r["key"] for r in records(tmp_path)}
    asked, before = len(executor.asked), snapshot(tmp_path / "results")
    assert bench("--dry-run", "--json", **changes) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["trials"] == (6 if changes else 0)
    assert {run["name"]: run["state"] for run in values["runs"]} == {
        f"tiny/rows/{method}/r2/s{seed}": state
        for seed in (0, 1)
        for method, state in (("lora", done), ("dynamic", missing))
    }
    assert snapshot(tmp_path / "results") == before
    assert len(executor.asked) == asked


def test_a_failed_run_is_shown_and_repeated_and_stops_no_other(bench, executor, tmp_path, capsys):
    executor.become = lambda given: (
        Outcome(status="failed", error="DataError: [red] is no\ncolour")
        if given.config.method == "lora"
        else completed(given)
    )
    assert bench() == 2
    told = capsys.readouterr().err
    assert "tiny/rows/lora/r2/s0: failed: DataError: [red] is no colour" in told
    assert f"every run of {tmp_path / 'small.yaml'} must complete, but got: 2 final" in told
    states = [(record["method"], record["status"]) for record in records(tmp_path)]
    assert states == [("dynamic", "completed")] * 2 + [("lora", "failed")] * 2
    executor.become = completed
    executor.asked.clear()
    assert bench() == 0
    assert [given.config.method for given in executor.asked] == ["lora", "lora"]


def test_a_stop_prints_the_command_that_continues(bench, executor, tmp_path, world, capsys):
    executor.interrupt_at(3)
    assert bench("--workers", 1) == 130
    places = f"--data {world} --models {world}"
    command = f"python -m benchmarks {tmp_path / 'small.yaml'} {places} --workers 1"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted: after 3 of 4 runs; continue with: {command}"
    )
    assert executor.closed
    states = sorted(record["status"] for record in records(tmp_path))
    assert states == ["completed", "completed", "interrupted"]
    executor.become = completed
    assert bench() == 0
    assert len(executor.asked) == 3 + 2


def test_a_study_continues_after_a_kill(executor, tmp_path, world, monkeypatch):
    """With a real worker, which ends with its parent and leaves nothing behind."""
    study, temporary = write_study(tmp_path), tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    words = [str(study), "--data", str(world), "--models", str(world), "--only", "*/lora/*"]
    with process_group([sys.executable, "-m", "benchmarks", *words], cwd=ROOT) as process:
        until(lambda: bool(records(tmp_path)) or process.poll() is not None)
        process.kill()
        process.wait()
        (done,) = records(tmp_path)
        until(lambda: not list(temporary.glob("dynlora-bench-*")))
    assert done["status"] == "completed"
    assert main(words) == 0
    assert len(executor.asked) == 1
    written = {record["key"]: record["written"] for record in records(tmp_path)}
    assert written[done["key"]] == done["written"], "not done again"


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (("--only", "*", "--only", "tiny"), {}, "`--only` must match the name of a run, such as"),
        (("--workers", "0"), {}, "Invalid value for '--workers': 0 is not in the range x>=1."),
        (("--zzz",), {}, "No such option '--zzz'"),
        (("--data", "gone"), {}, "`--data` must be a folder, but got "),
        ((), {"methods": {"lora": {"method": "x"}}}, "`method` must be one of "),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    bench, tmp_path, capsys, options, changes, message
):
    assert bench(*options, **changes) == 2
    assert error_of(capsys).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_a_placeholder_needs_a_folder_and_damaged_records_are_kept(
    bench, executor, tmp_path, world, capsys
):
    assert main([str(write_study(tmp_path)), "--models", str(world)]) == 2
    told = error_of(capsys)
    assert told.startswith("`--data DIR` must be given, because ")
    assert "names {data}/rows" in told
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.config.json").write_text('{"format": ')
    before = snapshot(tmp_path / "results")
    assert bench() == 2
    assert "small.config.json" in error_of(capsys)
    assert snapshot(tmp_path / "results") == before
    assert executor.asked == []


@pytest.mark.parametrize(
    ("changes", "options", "module_name", "advice"),
    [
        ({"tune": TUNE}, (), "optuna", "pip install optuna"),
        ({}, ("--ray", "local"), "ray", "pip install ray"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    bench, tmp_path, capsys, monkeypatch, changes, options, module_name, advice
):
    monkeypatch.setitem(sys.modules, module_name, None)
    monkeypatch.delitem(sys.modules, "benchmarks.harness.tuning", raising=False)
    assert bench(*options, **changes) == 2
    assert advice in error_of(capsys)
    assert not (tmp_path / "results").exists()


def test_help_and_a_dry_run_do_not_wait_for_torch(tmp_path, world):
    study = write_study(tmp_path, tune=TUNE)
    places = f"'--data', '{world}', '--models', '{world}'"
    script = (
        "import sys; from benchmarks.harness.command import main; "
        f"assert main(['{study}', {places}, '--dry-run', '--quiet']) == 0; "
        "assert not {'torch', 'optuna', 'ray'} & set(sys.modules)"
    )
    run_in_group([sys.executable, "-c", script], cwd=ROOT, check=True)
