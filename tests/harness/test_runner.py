"""What is done of a study, in which order, and what is asked of the executor."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.assignment import Assignment, Outcome
from benchmarks.harness.records import Files, open_records
from benchmarks.harness.runner import Runner, select
from benchmarks.harness.runs import Cell, Jobs, Run
from benchmarks.harness.tuning import open_tuner
from dynlora.errors import StudyError
from dynlora.train.config_file import flatten
from tests.harness.studies import FOUND, TUNE, StandIn, completed, finals, make_jobs


def run_study(
    jobs: Jobs,
    executor: StandIn,
    *,
    only: Sequence[str] = (),
    threads: int = 1,
    places: Mapping[str, Path] | None = None,
    keep: Path | None = None,
) -> tuple[list[tuple[Run, Mapping[str, Any], bool]], list[str]]:
    """Return what was told of each run, and of cells that were not tuned."""
    told: list[tuple[Run, Mapping[str, Any], bool]] = []
    tuning = jobs.study.tuning
    runner = Runner(
        jobs=jobs,
        records=open_records(jobs.study),
        executor=executor,
        threads=threads,
        places=places or {},
        keep=keep,
        watch=lambda *of_run: told.append(of_run),
    )
    problems = runner.run(select(jobs, only), None if tuning is None else open_tuner(jobs, tuning))
    return told, problems


def failing(when: Callable[[Assignment], bool], outcome: Outcome) -> StandIn:
    return StandIn(lambda given: outcome if when(given) else completed(given))


def test_every_final_run_is_done_once_and_never_again(tmp_path: Path) -> None:
    jobs, executor = make_jobs(tmp_path), StandIn()
    told, _ = run_study(jobs, executor)
    names = [run.name for run, _, _ in told]
    assert names == [f"tiny/rows/{m}/r2/s{s}" for s in (0, 1) for m in ("lora", "dynamic")]
    assert len(executor.asked) == 4
    again = StandIn()
    told, _ = run_study(make_jobs(tmp_path), again)
    assert again.asked == []
    assert all(was_there and record["status"] == "completed" for _, record, was_there in told)


def test_a_new_method_or_seed_adds_its_runs_alone(tmp_path: Path) -> None:
    run_study(make_jobs(tmp_path), StandIn())
    more = make_jobs(tmp_path, seeds=[0, 1, 2], methods={"adalora": {"method": "adalora"}})
    executor = StandIn()
    run_study(more, executor)
    asked = {(given.config.method, given.config.training.seed) for given in executor.asked}
    assert asked == {("adalora", 0), ("adalora", 1), ("adalora", 2), ("lora", 2), ("dynamic", 2)}


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "interrupted"])
def test_what_did_not_complete_is_done_again_and_nothing_else(tmp_path: Path, status: str) -> None:
    jobs = make_jobs(tmp_path)
    told, _ = run_study(
        jobs, failing(lambda given: given.config.method == "dynamic", Outcome(status=status))
    )
    assert sorted(record["status"] for _, record, _ in told) == sorted(
        ["completed", status, "completed", status]
    )
    executor = StandIn()
    told, _ = run_study(jobs, executor)
    assert [given.config.method for given in executor.asked] == ["dynamic", "dynamic"]
    assert {record["status"] for _, record, _ in told} == {"completed"}


def test_all_methods_are_asked_for_in_the_same_way(tmp_path: Path) -> None:
    """Two assignments of a seed differ in what the methods' fragments say, and in nothing else."""
    methods = {
        "adalora": {"method": "adalora", "adalora": {"interval": 3}},
        "rslora": {"method": "lora", "lora": {"use_rslora": True}},
    }
    jobs, executor = make_jobs(tmp_path, methods=methods, seeds=[0, 1]), StandIn()
    run_study(jobs, executor)
    by_seed: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for given in executor.asked:
        by_seed[given.config.training.seed].append(flatten(asdict(given)))
    for asked in by_seed.values():
        assert len(asked) == 4
        differing = {key for one in asked for key in one if one[key] != asked[0][key]}
        assert differing == {
            "config.method", "config.adalora.interval", "config.lora.use_rslora",
        }  # fmt: skip


def test_tuning_sees_no_row_of_the_exam_and_ends_before_any_is_looked_at(tmp_path: Path) -> None:
    jobs, executor = make_jobs(tmp_path, tune=TUNE), StandIn()
    told, problems = run_study(jobs, executor)
    assert problems == []
    exams = [given.exam for given in executor.asked]
    assert exams[:6] == [None] * 6
    assert None not in exams[6:]
    assert len(exams) == 6 + 4
    assert [run.kind for run, _, _ in told] == ["trial"] * 6 + ["final"] * 4
    assert {given.config.training.seed for given in executor.asked[:6]} == {1000}


def test_final_runs_have_the_best_values_of_their_own_method(tmp_path: Path) -> None:
    def loss(given: Assignment) -> Outcome:
        best = {"lora": 1e-3, "dynamic": 1e-1}[given.config.method]
        found = abs(given.config.training.learning_rate - best)
        return completed(given, validation={**FOUND["validation"], "loss": found})

    executor = StandIn(loss)
    run_study(make_jobs(tmp_path, tune=TUNE), executor)
    trials = [given.config for given in executor.asked if given.exam is None]
    for given in finals(executor):
        mine = [trial for trial in trials if trial.method == given.config.method]
        pick = max if given.config.method == "dynamic" else min
        best = pick(mine, key=lambda trial: trial.training.learning_rate)
        assert given.config.training.learning_rate == best.training.learning_rate
        assert given.config.lora.lora_alpha == best.lora.lora_alpha


def test_a_cell_that_could_not_be_tuned_has_no_final_run_until_it_is(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, tune=TUNE)
    broken = failing(
        lambda given: given.config.method == "lora", Outcome(status="failed", error="disk")
    )
    _, problems = run_study(jobs, broken)
    assert problems == ["tiny/rows/lora/r2 is not tuned: 0 of 3 trials have ended"]
    assert {given.config.method for given in finals(broken)} == {"dynamic"}
    mended = StandIn()
    assert run_study(jobs, mended)[1] == []
    assert {given.config.method for given in mended.asked} == {"lora"}
    assert len(mended.asked) == 3 + 2


def test_a_trial_that_diverged_counts_and_is_not_done_again(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, tune=TUNE)
    diverged = Outcome(status="failed", error="NonFiniteError: nan", diverged=True)
    executor = failing(
        lambda given: given.exam is None and given.config.training.learning_rate != 1e-2, diverged
    )
    told, problems = run_study(jobs, executor)
    assert problems == []
    assert {given.config.training.learning_rate for given in finals(executor)} == {1e-2}
    assert sum(record["diverged"] for _, record, _ in told) == 4
    again = StandIn()
    run_study(jobs, again)
    assert again.asked == []


def test_a_change_of_the_study_puts_the_old_final_runs_aside(tmp_path: Path) -> None:
    run_study(make_jobs(tmp_path), StandIn())
    changed = make_jobs(tmp_path, base={"training": {"epochs": 9}})
    run_study(changed, StandIn(), only=["*/lora/*"])
    aside = list((tmp_path / "results" / "small.superseded").iterdir())
    assert len(aside) == 2
    found = [record["method"] for record in Files(tmp_path / "results", "small").read()]
    assert sorted(found) == ["dynamic"] * 2 + ["lora"] * 2, "dynamic's were not selected"


def test_only_what_is_selected_is_tuned_and_run(tmp_path: Path) -> None:
    jobs, executor = make_jobs(tmp_path, tune=TUNE), StandIn()
    told, _ = run_study(jobs, executor, only=["*/dynamic/*/s1"])
    assert {given.config.method for given in executor.asked} == {"dynamic"}
    assert [run.name for run, _, _ in told][3:] == ["tiny/rows/dynamic/r2/s1"]


def test_a_selection_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"such as tiny/rows/lora/r2/s0, got lora: quote it"):
        select(make_jobs(tmp_path), ["*", "lora"])


def test_folders_of_this_machine_are_in_no_record(tmp_path: Path) -> None:
    jobs, executor = make_jobs(tmp_path), StandIn()
    places = {"data": Path("/some/data"), "models": Path("/some/models")}
    run_study(jobs, executor, places=places, keep=tmp_path / "runs")
    for given in executor.asked:
        assert given.config.data.path == "/some/data/rows"
        assert given.config.model.path == "/some/models/model"
        assert given.keep is not None
        assert given.keep.is_relative_to(tmp_path / "runs")
    assert len({given.keep for given in executor.asked}) == 4
    for path in (tmp_path / "results").rglob("*.*"):
        assert path.is_dir() or "/some" not in path.read_text()
    elsewhere = StandIn()
    run_study(jobs, elsewhere, places={"data": Path("/other")})
    assert elsewhere.asked == []


def test_as_many_runs_as_there_are_workers_are_under_way_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=20)

    def meet(given: Assignment) -> Outcome:
        together.wait()
        return completed(given)

    told, _ = run_study(make_jobs(tmp_path, tune=TUNE), StandIn(meet), threads=2)
    assert {record["status"] for _, record, _ in told} == {"completed"}


def test_a_stop_is_recorded_for_what_was_under_way_and_the_rest_is_not_begun(
    tmp_path: Path,
) -> None:
    executor = StandIn()

    executor.interrupt_at(2)
    jobs = make_jobs(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_study(jobs, executor)
    assert len(executor.asked) == 2
    records = open_records(jobs.study)
    states = [
        records.status(jobs.final(Cell("tiny", "rows", method, 2), seed, None))
        for seed in (0, 1)
        for method in ("lora", "dynamic")
    ]
    assert states == ["completed", "interrupted", None, None]
