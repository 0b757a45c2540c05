"""`python -m benchmarks STUDY` from end to end: runs, records, stops, and what it refuses."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import benchmarks.harness.command as module
from benchmarks.harness.assignment import Outcome
from benchmarks.harness.execute import execute
from benchmarks.harness.main import main
from benchmarks.harness.records import Files
from dynlora.cli.main import main as dynlora
from tests.cli.conftest import snapshot
from tests.harness.studies import TUNE, StandIn, completed, write_study
from tests.jobs import save_model, write_data
from tests.processes import process_group, run_in_group

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
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
    found = Files(folder / "results", "small").read()
    return sorted(found, key=lambda record: (record["method"], record["key"]))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that says what is wrong."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert captured.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in captured.err
    return lines[0].removeprefix("error: ")


@pytest.mark.usefixtures("here")
def test_a_study_leaves_a_record_of_every_run(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(seeds=[0]) == 0
    told = capsys.readouterr()
    found = {record["method"]: record for record in records(tmp_path)}
    assert found.keys() == {"lora", "dynamic"}
    for method, record in found.items():
        assert (record["status"], record["kind"], record["study"]) == (
            "completed",
            "final",
            "small",
        )
        test, loss = record["test"], record["validation"]["loss"]
        assert f"tiny/rows/{method}/r2/s0: validation accuracy" in told.err
        assert f"loss {loss:.4f}; test accuracy {test['accuracy']:.4f}" in told.err
    assert "small 2 of 2: " in told.err
    assert "2 completed; 0 were there before" in told.out
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.usefixtures("executor")
def test_json_says_what_became_of_each_run(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--json", tune=TUNE, seeds=[0]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values.keys() == {"study", "results", "problems", "runs"}
    kinds = [(run["kind"], run["status"], run["was_there"]) for run in values["runs"]]
    assert kinds == [("trial", "completed", False)] * 6 + [("final", "completed", False)] * 2
    keys = {record["key"] for record in records(tmp_path)}
    assert {run["key"] for run in values["runs"]} == keys


def test_a_dry_run_says_what_is_there_and_writes_nothing(
    bench: Bench, executor: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--dry-run", "--json") == 0
    assert not (tmp_path / "results").exists()
    assert {run["state"] for run in json.loads(capsys.readouterr().out)["runs"]} == {"to do"}
    assert bench("--only", "*/lora/*") == 0
    capsys.readouterr()
    before = snapshot(tmp_path / "results")
    assert bench("--dry-run", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert {run["name"]: run["state"] for run in values["runs"]} == {
        "tiny/rows/lora/r2/s0": "completed",
        "tiny/rows/dynamic/r2/s0": "to do",
        "tiny/rows/lora/r2/s1": "completed",
        "tiny/rows/dynamic/r2/s1": "to do",
    }
    assert bench("--dry-run") == 0
    assert "tiny/rows/dynamic/r2/s1" in capsys.readouterr().out
    assert snapshot(tmp_path / "results") == before
    assert len(executor.asked) == 2


def test_several_globs_take_the_runs_that_match_any_of_them(
    bench: Bench, executor: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--only", "*/lora/*/s0", "--only", "*/dynamic/r2/s1", "--json") == 0
    names = [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert names == ["tiny/rows/lora/r2/s0", "tiny/rows/dynamic/r2/s1"]
    assert len(executor.asked) == 2


def test_a_dry_run_knows_how_far_tuning_is(
    bench: Bench, executor: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--only", "*/lora/r2/s0", tune=TUNE) == 0
    capsys.readouterr()
    assert bench("--dry-run", "--json", tune=TUNE) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["trials"] == 6
    assert {run["name"]: run["state"] for run in values["runs"]} == {
        "tiny/rows/lora/r2/s0": "completed, if its tuning stays",
        "tiny/rows/dynamic/r2/s0": "to do; 0 of 3 trials are there",
        "tiny/rows/lora/r2/s1": "to do; 3 of 3 trials are there",
        "tiny/rows/dynamic/r2/s1": "to do; 0 of 3 trials are there",
    }


def test_a_run_that_fails_stops_no_other_and_is_done_again(
    bench: Bench, executor: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    executor.become = lambda given: (
        Outcome(status="failed", error="DataError: [red] is no\ncolour")
        if given.config.method == "lora"
        else completed(given)
    )
    assert bench() == 2
    told = error_of(capsys)
    assert told.startswith(f"every run of {tmp_path / 'small.yaml'} must complete, got: 2 final")
    states = [(record["method"], record["status"]) for record in records(tmp_path)]
    assert states == [("dynamic", "completed")] * 2 + [("lora", "failed")] * 2
    assert records(tmp_path)[2]["error"] == "DataError: [red] is no\ncolour"
    executor.become = completed
    executor.asked.clear()
    assert bench() == 0
    assert [given.config.method for given in executor.asked] == ["lora", "lora"]


def test_a_failure_is_told_in_its_line(
    bench: Bench, executor: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    executor.become = lambda given: Outcome(status="failed", error="DataError: [red] is no\ncolour")
    assert bench("--only", "*/lora/*/s0", "--json") == 2
    told = capsys.readouterr()
    assert "small 1 of 1: tiny/rows/lora/r2/s0: failed: DataError: [red] is no colour" in told.err
    assert json.loads(told.out)["runs"][0]["status"] == "failed"


def test_what_could_not_be_tuned_is_told(
    bench: Bench, executor: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    executor.become = lambda given: Outcome(status="out_of_memory", error="killed")
    assert bench(tune=TUNE) == 2
    assert "tiny/rows/lora/r2 is not tuned: 0 of 3 trials have ended" in error_of(capsys)


def test_a_stop_says_how_to_go_on(
    bench: Bench, executor: StandIn, tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    executor.interrupt_at(3)
    assert bench("--workers", 1) == 130
    places = f"--data {world} --models {world}"
    command = f"python -m benchmarks {tmp_path / 'small.yaml'} {places} --workers 1"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted: after 3 of 4 runs; go on: {command}"
    )
    assert executor.closed
    states = sorted(record["status"] for record in records(tmp_path))
    assert states == ["completed", "completed", "interrupted"]
    executor.become = completed
    assert bench() == 0
    assert len(executor.asked) == 3 + 2


def test_a_study_goes_on_after_a_kill(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real worker, which ends when its parent was killed and leaves nothing behind."""
    study, temporary = write_study(tmp_path), tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    words = [str(study), "--data", str(world), "--models", str(world)]
    with process_group([sys.executable, "-m", "benchmarks", *words], cwd=ROOT) as process:
        until(lambda: bool(records(tmp_path)) or process.poll() is not None)
        process.kill()
        process.wait()
        done = {record["key"]: record["written"] for record in records(tmp_path)}
        assert 0 < len(done) < 4
        until(lambda: not list(temporary.glob("dynlora-bench-*")))
    assert main(words) == 0
    after = {record["key"]: record for record in records(tmp_path)}
    assert len(after) == 4
    assert {record["status"] for record in after.values()} == {"completed"}
    assert {key: after[key]["written"] for key in done} == done, "not done again"


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.mark.usefixtures("here")
def test_folders_of_runs_can_be_kept(bench: Bench, tmp_path: Path) -> None:
    assert bench("--keep-runs", tmp_path / "kept", "--only", "*/lora/*/s0") == 0
    (run,) = (tmp_path / "kept").rglob("run.json")
    assert json.loads(run.read_text())["status"] == "finished"
    assert dynlora(["inspect", str(run.parent / "adapter"), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (("--only", "lora"), {}, "`--only` must match the name of a run, such as tiny/rows/lora/r"),
        (("--only", "*", "--only", "tiny"), {}, "`--only` must match the name of a run"),
        (("--workers", "0"), {}, "argument --workers: invalid a whole number of at least 1 value"),
        (("--zzz",), {}, "unrecognized arguments: --zzz"),
        ((), {"seeds": []}, "`seeds` in "),
        ((), {"methods": {"lora": {"lora": {"alpha": 3}}}}, "unknown key `lora.alpha` in methods"),
        ((), {"methods": {"lora": {"method": "x"}}}, "`method` must be one of "),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    bench: Bench,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert bench(*options, **changes) == 2
    assert error_of(capsys).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


@pytest.mark.parametrize(("missing", "named"), [("data", "{data}/rows"), ("models", "{models}/m")])
def test_a_placeholder_needs_its_folder(
    tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str], missing: str, named: str
) -> None:
    given = {"--data", "--models"} - {f"--{missing}"}
    options = [word for option in given for word in (option, str(world))]
    assert main([str(write_study(tmp_path)), *options]) == 2
    told = error_of(capsys)
    assert told.startswith(f"`--{missing} DIR` must be given, for ")
    assert f"names {named}" in told


@pytest.mark.parametrize("option", ["--data", "--models"])
def test_a_folder_for_a_placeholder_must_be_there_also_for_a_dry_run(
    tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    places = {"--data": world, "--models": world} | {option: tmp_path / "gone"}
    options = [str(word) for pair in places.items() for word in pair]
    assert main([str(write_study(tmp_path)), *options, "--dry-run"]) == 2
    assert error_of(capsys).startswith(f"`{option}` must be a folder, got {tmp_path / 'gone'}")


@pytest.mark.parametrize(
    ("changes", "options", "module_name", "advice"),
    [
        ({"tune": TUNE}, (), "optuna", "pip install optuna"),
        ({}, ("--ray", "local"), "ray", "pip install ray"),
    ],
)
def test_what_is_not_installed_is_named_with_the_command(
    bench: Bench,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    options: tuple[str, ...],
    module_name: str,
    advice: str,
) -> None:
    monkeypatch.setitem(sys.modules, module_name, None)
    monkeypatch.delitem(sys.modules, "benchmarks.harness.tuning", raising=False)
    assert bench(*options, **changes) == 2
    assert advice in error_of(capsys)
    assert not (tmp_path / "results").exists()


def test_results_that_are_no_records_are_refused_and_kept(
    bench: Bench, executor: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.config.json").write_text('{"format": ')
    before = snapshot(tmp_path / "results")
    assert bench() == 2
    assert "small.config.json" in error_of(capsys)
    assert snapshot(tmp_path / "results") == before
    assert executor.asked == []


def test_a_study_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere.yaml")]) == 2
    assert "STUDY must be a YAML file, got " in error_of(capsys)
    assert main([]) == 2
    assert "the following arguments are required: STUDY" in error_of(capsys)


@pytest.mark.parametrize("words", [["--help"], ["report", "--help"]])
def test_help_is_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(
        " ".join(["usage: python -m benchmarks", *words[:-1], ""])
    )


def test_help_and_a_dry_run_do_not_wait_for_torch(tmp_path: Path, world: Path) -> None:
    study = write_study(tmp_path, tune=TUNE)
    places = f"'--data', '{world}', '--models', '{world}'"
    script = (
        "import sys; from benchmarks.harness.main import main; "
        f"assert main(['{study}', {places}, '--dry-run', '--quiet']) == 0; "
        "assert not {'torch', 'optuna', 'ray'} & set(sys.modules)"
    )
    run_in_group([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_there_are_studies() -> None:
    assert "first_look.yaml" in {path.name for path in STUDIES}


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_every_study_of_ours_is_valid(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--data", str(tmp_path), "--models", str(tmp_path)]
    assert main([str(study), *places, "--dry-run", "--quiet"]) == 0
    results = yaml.safe_load(study.read_text())["results"]
    assert results == "benchmarks/results", "where the report looks"
