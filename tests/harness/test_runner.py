"""The order of a study's runs, and the assignments that the executor receives."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.assignment import Assignment, Outcome
from benchmarks.harness.records import RecordFiles, open_records
from benchmarks.harness.runner import Runner, select
from benchmarks.harness.runs import Jobs, Run
from benchmarks.harness.study import StudyError
from benchmarks.harness.tuning import OptunaTuner
from dynlora.files.plain_values import flatten
from tests.harness.studies import FOUND, TUNE, StandIn, completed, make_jobs

Told = list[tuple[Run, Mapping[str, Any], bool]]


def run_study(
    jobs: Jobs,
    executor: StandIn,
    *,
    only: Sequence[str] = (),
    threads: int = 1,
    places: Mapping[str, Path] | None = None,
    keep: Path | None = None,
) -> tuple[Told, list[str]]:
    """Return each run with its record, and the problems of tuning."""
    told: Told = []
    tuning = jobs.study.tune
    runner = Runner(
        jobs=jobs,
        records=open_records(jobs.study),
        executor=executor,
        threads=threads,
        places=places or {},
        keep=keep,
        watch=lambda *of_run: told.append(of_run),
    )
    tune = None if tuning is None else OptunaTuner(jobs, tuning).tune
    problems = runner.run(select(jobs, only), tune)
    return told, problems


def failing(when: Callable[[Assignment], bool], outcome: Outcome) -> StandIn:
    return StandIn(lambda given: outcome if when(given) else completed(given))


def test_every_final_run_is_done_once_and_a_larger_study_adds_runs(tmp_path):
    jobs, executor = make_jobs(tmp_path), StandIn()
    told, _ = run_study(jobs, executor)
    names = [run.name for run, _, _ in told]
    assert names == [f"tiny/rows/{m}/r2/s{s}" for s in (0, 1) for m in ("lora", "dynamic")]
    again = StandIn()
    told, _ = run_study(make_jobs(tmp_path), again)
    assert again.asked == []
    assert all(was_there and record["status"] == "completed" for _, record, was_there in told)
    more = make_jobs(tmp_path, seeds=[0, 1, 2], methods={"adalora": {"method": "adalora"}})
    run_study(more, again)
    asked = {(given.config.method, given.config.training.seed) for given in again.asked}
    assert asked == {("adalora", 0), ("adalora", 1), ("adalora", 2), ("lora", 2), ("dynamic", 2)}


def test_assignments_of_methods_differ_only_in_their_fragments(tmp_path):
    methods = {
        "adalora": {"method": "adalora", "adalora": {"interval": 3}},
        "rslora": {"method": "lora", "lora": {"use_rslora": True}},
    }
    jobs, executor = make_jobs(tmp_path, methods=methods, seeds=[0, 1]), StandIn()
    run_study(jobs, executor)
    for seed in (0, 1):
        asked = [flatten(asdict(a)) for a in executor.asked if a.config.training.seed == seed]
        assert len(asked) == 4
        differing = {key for one in asked for key in one if one[key] != asked[0][key]}
        assert differing == {
            "config.method", "config.adalora.interval", "config.lora.use_rslora",
        }  # fmt: skip


def test_tuning_ends_before_the_first_exam_and_final_runs_use_its_choice(tmp_path):
    def loss(given: Assignment) -> Outcome:
        best = {"lora": 1e-3, "dynamic": 1e-1}[given.config.method]
        found = abs(given.config.training.learning_rate - best)
        return completed(given, validation={**FOUND["validation"], "loss": found})

    executor = StandIn(loss)
    told, problems = run_study(make_jobs(tmp_path, tune=TUNE), executor)
    assert problems == []
    assert [run.kind for run, _, _ in told] == ["trial"] * 6 + ["final"] * 4
    trials, finals = executor.asked[:6], executor.asked[6:]
    assert {given.exam for given in trials} == {None}
    assert {given.config.training.seed for given in trials} == {1000}
    for given in finals:
        assert given.exam is not None
        mine = [a.config for a in trials if a.config.method == given.config.method]
        pick = max if given.config.method == "dynamic" else min
        best = pick(mine, key=lambda trial: trial.training.learning_rate)
        assert given.config.training.learning_rate == best.training.learning_rate
        assert given.config.lora.lora_alpha == best.lora.lora_alpha


def test_a_combination_without_tuning_has_no_final_run(tmp_path):
    jobs = make_jobs(tmp_path, tune=TUNE)
    outcome = Outcome(status="failed", error="disk")
    broken = failing(lambda given: given.config.method == "lora", outcome)
    _, problems = run_study(jobs, broken)
    assert problems == ["tiny/rows/lora/r2 is not tuned: 0 of 3 trials have ended"]
    assert {given.config.method for given in broken.asked if given.exam} == {"dynamic"}
    mended = StandIn()
    assert run_study(jobs, mended)[1] == []
    assert [given.config.method for given in mended.asked] == ["lora"] * (3 + 2)


def test_a_diverged_trial_counts_and_is_not_repeated(tmp_path):
    jobs = make_jobs(tmp_path, tune=TUNE)
    diverged = Outcome(status="failed", error="NonFiniteError: nan", diverged=True)
    executor = failing(
        lambda given: given.exam is None and given.config.training.learning_rate != 1e-2, diverged
    )
    told, problems = run_study(jobs, executor)
    assert problems == []
    rates = {given.config.training.learning_rate for given in executor.asked if given.exam}
    assert rates == {1e-2}
    assert sum(record["diverged"] for _, record, _ in told) == 4
    again = StandIn()
    run_study(jobs, again)
    assert again.asked == []


@pytest.mark.parametrize("merged", [True, False])
def test_a_changed_study_puts_only_the_selected_old_runs_aside(tmp_path, merged):
    old, results = make_jobs(tmp_path), tmp_path / "results"
    run_study(old, StandIn())
    if merged:
        open_records(old.study).merge()
    changed = make_jobs(tmp_path, base={"training": {"epochs": 9}})
    told, _ = run_study(changed, StandIn(), only=["*/lora/*"])
    assert [run.name for run, _, _ in told] == [f"tiny/rows/lora/r2/s{seed}" for seed in (0, 1)]
    aside = [json.loads(path.read_text()) for path in (results / "small.superseded").iterdir()]
    assert [record["config"]["training"]["epochs"] for record in aside] == [2, 2]
    found = [record["method"] for record in RecordFiles(results, "small").read()]
    assert sorted(found) == ["dynamic"] * 2 + ["lora"] * 2
    with pytest.raises(StudyError, match=r"such as tiny/rows/lora/r2/s0, but got lora. Quote it"):
        select(changed, ["*", "lora"])


def test_no_record_contains_folders_of_this_machine(tmp_path):
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


def test_as_many_runs_as_workers_are_in_progress(tmp_path):
    together = threading.Barrier(2, timeout=20)

    def meet(given: Assignment) -> Outcome:
        together.wait()
        return completed(given)

    told, _ = run_study(make_jobs(tmp_path, tune=TUNE), StandIn(meet), threads=2)
    assert {record["status"] for _, record, _ in told} == {"completed"}
