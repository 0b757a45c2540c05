"""The folder of records."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.assignment import Outcome
from benchmarks.harness.records import ASIDE, open_records
from benchmarks.harness.report.record import as_record
from benchmarks.harness.runs import Cell, Choice
from dynlora.errors import RunFileError
from tests.harness.studies import FOUND, make_jobs

LORA = Cell("tiny", "rows", "lora", 2)
DONE = Outcome(status="completed", values=dict(FOUND), notes=("cut",))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "results").iterdir())


def test_a_record_says_all_that_a_report_needs(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, description="Why?")
    run = jobs.final(LORA, 1, Choice(learning_rate=0.5, scale=4.0))
    open_records(jobs.study).write(run, DONE)
    (path,) = (tmp_path / "results").iterdir()
    values = json.loads(path.read_text())
    assert {key: values[key] for key in ("study", "kind", "key", "model", "task", "method")} == {
        "study": "small", "kind": "final", "key": run.key, "model": "tiny", "task": "rows",
        "method": "lora",
    }  # fmt: skip
    assert (values["budget"], values["seed"], values["status"]) == (2, 1, "completed")
    assert values["tuned"] == {"learning_rate": 0.5, "scale": 4.0}
    assert values["config"]["data"]["path"] == "{data}/rows"
    assert (values["error"], values["notes"]) == (None, ["cut"])
    assert str(tmp_path) not in path.read_text()
    read = as_record(path, values)
    assert read.outcome is not None
    assert (read.outcome.metric, read.outcome.live) == (0.75, 9)


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "interrupted"])
def test_what_did_not_complete_is_recorded_and_done_again(tmp_path: Path, status: str) -> None:
    jobs = make_jobs(tmp_path)
    run = jobs.final(LORA, 0, None)
    open_records(jobs.study).write(run, Outcome(status=status, error="why"))
    again = open_records(jobs.study)
    assert again.status(run) == status
    assert again.ended(run) is None
    (path,) = (tmp_path / "results").iterdir()
    read = as_record(path, json.loads(path.read_text()))
    assert (read.status, read.error, read.outcome) == (status, "why", None)
    again.write(run, DONE)
    assert len(files(tmp_path)) == 1
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


def test_a_final_run_with_other_settings_is_put_aside_and_kept(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    records = open_records(jobs.study)
    old = jobs.final(LORA, 0, None)
    kept = [jobs.final(LORA, 1, None), jobs.trial(LORA, 9, 0, jobs.defaults(LORA))]
    for run in (old, *kept):
        records.write(run, DONE)
    new = jobs.final(LORA, 0, Choice(learning_rate=0.5, scale=4.0))
    records = open_records(jobs.study)
    records.put_aside(new)
    assert [name for name in files(tmp_path) if name.endswith(ASIDE)] == [
        f"final-tiny-rows-lora-r2-s0-{old.key}.json{ASIDE}"
    ]
    assert open_records(jobs.study).status(old) is None
    assert all(open_records(jobs.study).ended(run) for run in kept)


def test_a_record_from_before_a_setting_is_found_and_replaced_in_its_place(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    run = jobs.final(LORA, 0, None)
    open_records(jobs.study).write(run, Outcome(status="failed"))
    (path,) = (tmp_path / "results").iterdir()
    values = json.loads(path.read_text())
    del values["config"]["dynamic"]["events"]
    path.rename(path.with_name("final-old-name.json")).write_text(json.dumps(values))
    records = open_records(jobs.study)
    assert records.status(run) == "failed"
    records.write(run, DONE)
    assert files(tmp_path) == [f"final-tiny-rows-lora-r2-s0-{run.key}.json"]


def test_records_of_another_study_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    run = jobs.final(LORA, 0, None)
    open_records(jobs.study).write(run, DONE)
    (path,) = (tmp_path / "results").iterdir()
    path.write_text(path.read_text().replace('"small"', '"other"'))
    assert open_records(jobs.study).status(run) is None


@pytest.mark.parametrize("content", [{"a": 1}, {"study": "small", "kind": "final"}])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: Any) -> None:
    jobs = make_jobs(tmp_path)
    jobs.study.results.mkdir()
    (jobs.study.results / "notes.json").write_text(json.dumps(content))
    with pytest.raises(RunFileError, match=r"the record of a run, got notes.json, which has"):
        open_records(jobs.study)


def test_results_must_be_a_folder(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    jobs.study.results.write_text("")
    with pytest.raises(RunFileError, match=r"`results` of .* must be a folder, got .*, which is a"):
        open_records(jobs.study)
