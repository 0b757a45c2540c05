"""The records of a study: tables and parts, with several processes, kills and changes."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks.harness.assignment import Outcome
from benchmarks.harness.records import RecordFiles, open_records
from benchmarks.harness.runs import Choice, Jobs
from dynlora.errors import RunFileError
from tests.harness.studies import DYNAMIC, FOUND, LORA, make_jobs

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


def test_tables_have_a_row_per_run_and_a_column_per_value_that_varies(tmp_path):
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


def test_ranks_are_kept_as_changes(tmp_path):
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
    found = {record["method"]: record for record in RecordFiles(jobs.study.results, "small").read()}
    assert (found["dynamic"]["initial_ranks"], found["dynamic"]["final_ranks"]) == (start, ends)
    assert found["lora"]["final_ranks"] == start


def test_texts_that_look_like_other_values_stay_texts(tmp_path):
    texts = ["true", "1", '"', "", "null", "a,b", "two\nlines", "NaN", "é"]
    jobs = make_jobs(tmp_path)
    records = open_records(jobs.study)
    for seed, error in enumerate(texts):
        outcome = Outcome(status="failed", error=error)
        records.write(jobs.final(LORA, seed, None), outcome)
    records.merge()
    read = RecordFiles(jobs.study.results, "small").read()
    found = {record["seed"]: record["error"] for record in read}
    assert found == dict(enumerate(texts))


def test_a_record_older_than_a_setting_is_found_and_replaced(tmp_path):
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


def test_processes_of_one_study_keep_each_others_runs(tmp_path):
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
def test_a_kill_while_tables_are_replaced_loses_no_run(tmp_path, monkeypatch, moved):
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


def test_a_file_that_is_no_record_is_refused(tmp_path):
    jobs = make_jobs(tmp_path)
    jobs.study.results.write_text("")
    with pytest.raises(RunFileError, match=r"`results` of .* must be a folder, but got .*, a file"):
        open_records(jobs.study)
    jobs.study.results.unlink()
    parts = RecordFiles(jobs.study.results, "small").parts
    parts.mkdir(parents=True)
    (parts / "notes.json").write_text('{"study": "small", "kind": "final"}')
    with pytest.raises(RunFileError, match=r"the record of a run, but got notes.json without"):
        open_records(jobs.study)
