"""Tuning: as many trials for each method, the same start, and an end that a stop cannot change."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.runs import Cell, Choice, Jobs
from benchmarks.harness.tuning import STORAGE, OptunaTuner, open_tuner
from dynlora.errors import StudyError
from tests.harness.studies import TUNE, make_jobs

LORA = Cell("tiny", "rows", "lora", 2)
DYNAMIC = Cell("tiny", "rows", "dynamic", 2)
Value = Callable[[int, Choice], float | None]


class Measured:
    """Notes what is tried and says how good it was."""

    def __init__(self, value: Value) -> None:
        self.value = value
        self.tried: list[Choice] = []

    def __call__(self, number: int, choice: Choice) -> float | None:
        self.tried.append(choice)
        return self.value(number, choice)


def far_from(rate: float) -> Value:
    """Return a loss that is lowest at a learning rate."""
    return lambda _, choice: abs(math.log(choice.learning_rate / rate))


def jobs_of(folder: Path, **changes: Any) -> Jobs:
    return make_jobs(folder, tune={**TUNE, **changes})


def tuner_of(jobs: Jobs) -> OptunaTuner:
    assert jobs.study.tuning is not None
    return open_tuner(jobs, jobs.study.tuning)


def test_every_method_gets_as_many_trials_from_the_same_start(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, trials=5)
    tuner = tuner_of(jobs)
    lora, dynamic = Measured(far_from(0.02)), Measured(far_from(0.002))
    tuner.tune(LORA, lora)
    tuner.tune(DYNAMIC, dynamic)
    assert len(lora.tried) == len(dynamic.tried) == 5
    assert lora.tried[0] == jobs.defaults(LORA) == Choice(learning_rate=1e-2, scale=2.0)
    assert lora.tried == dynamic.tried, "five draws of a sampler that has learned nothing yet"
    assert len(set(lora.tried)) == 5
    for choice in lora.tried:
        assert 1e-3 <= choice.learning_rate <= 1e-1
        assert 1 <= choice.scale <= 8


def test_the_best_trial_is_the_choice(tmp_path: Path) -> None:
    measured = Measured(far_from(0.05))
    best = tuner_of(jobs_of(tmp_path, trials=6)).tune(LORA, measured)
    assert best == min(measured.tried, key=lambda choice: far_from(0.05)(0, choice) or 0.0)


def test_a_metric_that_reports_call_better_when_lower_is_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynlora.report.wording.LOWER_IS_BETTER", {"accuracy"})
    measured = Measured(lambda _, choice: choice.learning_rate)
    best = tuner_of(jobs_of(tmp_path, metric="accuracy", trials=6)).tune(LORA, measured)
    assert best == min(measured.tried, key=lambda choice: choice.learning_rate)


def test_a_metric_that_is_better_when_higher_is_raised(tmp_path: Path) -> None:
    measured = Measured(lambda _, choice: choice.learning_rate)
    best = tuner_of(jobs_of(tmp_path, metric="accuracy", trials=6)).tune(LORA, measured)
    assert best == max(measured.tried, key=lambda choice: choice.learning_rate)


def test_a_stop_changes_no_proposal(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = Measured(far_from(0.02))
    tuner_of(jobs_of(tmp_path / "a", trials=13)).tune(LORA, straight)

    jobs = jobs_of(tmp_path / "b", trials=13)
    for ends in (2, 11):  # before the sampler has learned, and after

        def stop(number: int, choice: Choice, ends: int = ends) -> float | None:
            return None if number == ends else far_from(0.02)(number, choice)

        with pytest.raises(StudyError, match=rf"is not tuned: {ends} of 13 trials have ended"):
            tuner_of(jobs).tune(LORA, Measured(stop))
    resumed = Measured(far_from(0.02))
    tuner_of(jobs).tune(LORA, resumed)
    assert resumed.tried == straight.tried, "those that had ended, and then the rest"


def test_more_trials_go_on_from_those_that_are_there(tmp_path: Path) -> None:
    first = Measured(far_from(0.02))
    tuner_of(jobs_of(tmp_path, trials=2)).tune(LORA, first)
    more = Measured(far_from(0.02))
    tuner_of(jobs_of(tmp_path, trials=4)).tune(LORA, more)
    assert more.tried[:2] == first.tried
    assert len(more.tried) == 4


def test_fewer_trials_leave_the_later_ones_out_of_account(tmp_path: Path) -> None:
    def later_is_better(number: int, _choice: Choice) -> float:
        return -number

    measured = Measured(later_is_better)
    assert tuner_of(jobs_of(tmp_path, trials=4)).tune(LORA, measured) == measured.tried[3]
    fewer = tuner_of(jobs_of(tmp_path, trials=2)).tune(LORA, Measured(later_is_better))
    assert fewer == measured.tried[1]


def test_trials_of_other_settings_do_not_count(tmp_path: Path) -> None:
    tuner_of(jobs_of(tmp_path)).tune(LORA, Measured(far_from(0.02)))
    other = make_jobs(tmp_path, tune=TUNE, base={"training": {"epochs": 9}})
    measured = Measured(far_from(0.02))
    tuner_of(other).tune(LORA, measured)
    assert measured.tried[0] == other.defaults(LORA)
    assert (tmp_path / "results" / f"small{STORAGE}").is_file(), "all of them in one file"


def test_training_that_diverged_is_never_the_choice(tmp_path: Path) -> None:
    def diverges(number: int, choice: Choice) -> float:
        return math.inf if number != 1 else 5.0

    measured = Measured(diverges)
    assert tuner_of(jobs_of(tmp_path)).tune(LORA, measured) == measured.tried[1]
    raised = Measured(diverges)
    (tmp_path / "up").mkdir()
    jobs = jobs_of(tmp_path / "up", metric="accuracy")
    assert tuner_of(jobs).tune(LORA, raised) == raised.tried[1]


def test_there_is_no_choice_where_training_always_diverged(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"lora/r2 cannot be .* diverged in all of its 3 trials"):
        tuner_of(jobs_of(tmp_path)).tune(LORA, Measured(lambda *_: math.inf))


def test_what_is_not_tuned_stays_as_it_is(tmp_path: Path) -> None:
    measured = Measured(far_from(0.02))
    tuner_of(jobs_of(tmp_path, scale=None)).tune(LORA, measured)
    assert {choice.scale for choice in measured.tried} == {2.0}
    assert len({choice.learning_rate for choice in measured.tried}) == 3


def test_a_choice_from_a_list_is_one_of_it(tmp_path: Path) -> None:
    measured = Measured(far_from(0.02))
    tuner_of(jobs_of(tmp_path, trials=8, scale={"choices": [1, 2, 4]})).tune(LORA, measured)
    assert {choice.scale for choice in measured.tried} <= {1.0, 2.0, 4.0}
    assert measured.tried[0].scale == 2.0


def test_two_processes_that_tune_the_same_cell_come_to_the_same_choice(tmp_path: Path) -> None:
    jobs, others = jobs_of(tmp_path, trials=4), []

    def slow(number: int, choice: Choice) -> float | None:
        if not others:  # while the first trial is under way here
            others.append(tuner_of(jobs).tune(LORA, Measured(far_from(0.02))))
        return far_from(0.02)(number, choice)

    assert tuner_of(jobs).tune(LORA, slow) == others[0]


def test_no_metric_is_each_tasks_main_one(tmp_path: Path) -> None:
    assert tuner_of(jobs_of(tmp_path)).metric(LORA) == "loss"
    assert tuner_of(jobs_of(tmp_path, metric=None)).metric(LORA) == "accuracy"
