"""The records of a study: tables and parts, for several processes, across kills and changes."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks.harness.assignment import Outcome
from benchmarks.harness.records import Files, open_records
from benchmarks.harness.report.record import as_record
from benchmarks.harness.runs import Cell, Choice, Jobs
from dynlora.errors import RunFileError
from tests.harness.studies import FOUND, make_jobs

LORA = Cell("tiny", "rows", "lora", 2)
DYNAMIC = Cell("tiny", "rows", "dynamic", 2)
DONE = Outcome(status="completed", values=dict(FOUND), notes=("cut",))
TABLES = ["small.config.json", "small.csv", "small.ranks.csv"]


def files(folder: Path) -> list[str]:
    paths = (folder / "results").rglob("*.*")
    return sorted(path.name for path in paths if path.is_file() and path.suffix != ".lock")


def rows(folder: Path, ending: str = "") -> list[dict[str, str]]:
    text = (folder / "results" / f"small{ending}.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


def fill(jobs: Jobs, count: int = 2, outcome: Outcome = DONE) -> None:
    records = open_records(jobs.study)
    for seed in range(count):
        records.write(jobs.final(LORA, seed, None), outcome)
    records.merge()


def test_a_record_says_all_that_a_report_needs(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, description="Why?")
    run = jobs.final(LORA, 1, Choice(learning_rate=0.5, scale=4.0))
    open_records(jobs.study).write(run, DONE)
    (values,) = Files(jobs.study.results, "small").read()
    assert {key: values[key] for key in ("study", "kind", "key", "model", "task", "method")} == {
        "study": "small", "kind": "final", "key": run.key, "model": "tiny", "task": "rows",
        "method": "lora",
    }  # fmt: skip
    assert (values["budget"], values["seed"], values["status"]) == (2, 1, "completed")
    assert values["tuned"] == {"learning_rate": 0.5, "scale": 4.0}
    assert values["config"]["data"]["path"] == "{data}/rows"
    assert (values["error"], values["notes"]) == (None, ["cut"])
    assert str(tmp_path) not in json.dumps(values)
    read = as_record(tmp_path, values)
    assert read.outcome is not None
    assert (read.outcome.metric, read.outcome.live) == (0.75, 9)


def test_tables_have_a_row_per_run_and_a_column_per_value_that_varies(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    fill(jobs)
    assert files(tmp_path) == TABLES
    first, second = rows(tmp_path)
    assert (first["seed"], second["seed"], first["status"]) == ("0", "1", "completed")
    assert "config.training.seed" in first
    assert not {"validation.loss", "config.training.epochs", "seconds.whole"} & set(first)
    shared = json.loads((tmp_path / "results" / "small.config.json").read_text())["shared"]
    assert shared["validation"]["loss"] == 0.5
    assert shared["config"]["training"]["epochs"] == 2
    assert "seconds" not in shared


def test_ranks_are_kept_as_changes(tmp_path: Path) -> None:
    start = {"query": 2, "key": 2, "value": 2}
    ends = {"query": 4, "key": 1, "value": 2}
    moved = {
        "steps": 10, "initial_ranks": start, "final_ranks": ends,
        "rank_changes": [(3, "query", 3), (3, "key", 1), (6, "query", 4)],
    }  # fmt: skip
    jobs = make_jobs(tmp_path)
    records = open_records(jobs.study)
    run, still = jobs.final(DYNAMIC, 0, None), jobs.final(LORA, 0, None)
    records.write(run, Outcome(status="completed", values={**FOUND, **moved}))
    records.write(still, Outcome(status="completed", values={**FOUND, "final_ranks": start}))
    records.merge()
    assert [tuple(row.values()) for row in rows(tmp_path, ".ranks")] == [
        (run.key, "3", "query", "3"), (run.key, "3", "key", "1"), (run.key, "6", "query", "4"),
    ]  # fmt: skip
    assert [(row["method"], row["moved"]) for row in rows(tmp_path)] == [
        ("dynamic", "true"), ("lora", "false"),
    ]  # fmt: skip
    found = {record["method"]: record for record in Files(jobs.study.results, "small").read()}
    assert (found["dynamic"]["initial_ranks"], found["dynamic"]["final_ranks"]) == (start, ends)
    assert found["lora"]["final_ranks"] == start


@pytest.mark.parametrize("text", ["true", "1", '"', "", "null", "a,b", "two\nlines", "NaN", "é"])
def test_texts_that_look_like_other_values_stay_texts(tmp_path: Path, text: str) -> None:
    jobs = make_jobs(tmp_path)
    records = open_records(jobs.study)
    for seed, error in enumerate([text, "other"]):
        outcome = Outcome(status="failed", error=error)
        records.write(jobs.final(LORA, seed, None), outcome)
    records.merge()
    read = Files(jobs.study.results, "small").read()
    found = {record["seed"]: record["error"] for record in read}
    assert found == {0: text, 1: "other"}


def test_a_long_error_is_cut_so_that_tables_can_be_read(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    fill(jobs, outcome=Outcome(status="failed", error="x" * 200_000))
    found = Files(jobs.study.results, "small").read()
    assert all(len(record["error"]) <= 4000 for record in found)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("status", ["failed", "out_of_memory", "interrupted"])
def test_what_did_not_complete_is_recorded_and_done_again(
    tmp_path: Path, status: str, merged: bool
) -> None:
    jobs = make_jobs(tmp_path)
    run, first = jobs.final(LORA, 0, None), open_records(jobs.study)
    first.write(run, Outcome(status=status, error="why"))
    if merged:
        first.merge()
    again = open_records(jobs.study)
    assert again.status(run) == status
    assert again.ended(run) is None
    (values,) = Files(jobs.study.results, "small").read()
    read = as_record(tmp_path, values)
    assert (read.status, read.error, read.outcome) == (status, "why", None)
    again.write(run, DONE)
    again.merge()
    assert [row["status"] for row in rows(tmp_path)] == ["completed"]
    assert open_records(jobs.study).ended(run) is not None


def test_a_trial_in_which_training_diverged_has_ended_but_a_final_run_has_not(
    tmp_path: Path,
) -> None:
    jobs = make_jobs(tmp_path)
    records = open_records(jobs.study)
    trial, final = jobs.trial(LORA, 9, 0, jobs.defaults(LORA)), jobs.final(LORA, 0, None)
    for run in (trial, final):
        records.write(run, Outcome(status="failed", error="nan", diverged=True))
    assert records.ended(trial) is not None
    assert records.ended(final) is None


@pytest.mark.parametrize("merged", [True, False])
def test_a_final_run_with_other_settings_is_put_aside_and_kept(
    tmp_path: Path, merged: bool
) -> None:
    jobs = make_jobs(tmp_path)
    records = open_records(jobs.study)
    old = jobs.final(LORA, 0, None)
    kept = [jobs.final(LORA, 1, None), jobs.trial(LORA, 9, 0, jobs.defaults(LORA))]
    for run in (old, *kept):
        records.write(run, DONE)
    if merged:
        records.merge()
    new = jobs.final(LORA, 0, Choice(learning_rate=0.5, scale=4.0))
    records = open_records(jobs.study)
    records.put_aside([new])
    aside = tmp_path / "results" / "small.superseded" / f"final-{old.key}.json"
    assert json.loads(aside.read_text())["validation"] == FOUND["validation"]
    assert open_records(jobs.study).status(old) is None
    assert all(open_records(jobs.study).ended(run) for run in kept)


def test_a_record_from_before_a_setting_is_found_and_replaced_in_its_place(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    run = jobs.final(LORA, 0, None)
    records = open_records(jobs.study)
    record = records.write(run, Outcome(status="failed"))
    del record["config"]["dynamic"]["events"]
    records.files.replace([record | {"key": "of-that-time"}])
    (records.files.parts / f"final-{run.key}.json").unlink()
    records = open_records(jobs.study)
    assert records.status(run) == "failed"
    records.write(run, DONE)
    records.merge()
    assert [(row["key"], row["status"]) for row in rows(tmp_path)] == [(run.key, "completed")]


def test_processes_that_run_one_study_keep_the_runs_of_each_other(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    one, other = open_records(jobs.study), open_records(jobs.study)
    one.write(jobs.final(LORA, 0, None), DONE)
    other.write(jobs.final(DYNAMIC, 0, None), DONE)
    one.merge()
    other.write(jobs.final(DYNAMIC, 1, None), DONE)
    other.merge()
    found = [(row["method"], row["seed"]) for row in rows(tmp_path)]
    assert found == [("dynamic", "0"), ("dynamic", "1"), ("lora", "0")]
    assert files(tmp_path) == TABLES


@pytest.mark.parametrize("moved", range(4))
def test_a_kill_while_tables_are_replaced_loses_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    jobs = make_jobs(tmp_path)
    fill(jobs, 1)
    records = open_records(jobs.study)
    # The first run had a value in common with none; now its columns change.
    run = jobs.final(LORA, 1, Choice(learning_rate=0.5, scale=4.0))
    records.write(run, DONE)
    real, count = Path.replace, 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal count
        if path.parent.name == "small.pending":
            count += 1
            if count > moved:
                raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        if moved < len(TABLES):
            with pytest.raises(KeyboardInterrupt):
                records.merge()
        else:
            records.merge()
    again = open_records(jobs.study)
    assert again.ended(run) is not None
    assert again.ended(jobs.final(LORA, 0, None)) is not None
    again.write(jobs.final(LORA, 2, None), DONE)
    again.merge()
    assert [row["seed"] for row in rows(tmp_path)] == ["0", "1", "2"]
    assert files(tmp_path) == TABLES


def test_records_of_other_studies_share_the_folder(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    run = jobs.final(LORA, 0, None)
    fill(jobs)
    for name in TABLES:
        path = tmp_path / "results" / name
        path.rename(path.with_name(name.replace("small", "other")))
    assert open_records(jobs.study).status(run) is None


@pytest.mark.parametrize("content", [{"a": 1}, {"study": "small", "kind": "final"}])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: dict[str, object]) -> None:
    jobs = make_jobs(tmp_path)
    parts = Files(jobs.study.results, "small").parts
    parts.mkdir(parents=True)
    (parts / "notes.json").write_text(json.dumps(content))
    with pytest.raises(RunFileError, match=r"the record of a run, got notes.json, which has"):
        open_records(jobs.study)


def test_results_must_be_a_folder(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    jobs.study.results.write_text("")
    with pytest.raises(RunFileError, match=r"`results` of .* must be a folder, got .*, which is a"):
        open_records(jobs.study)
