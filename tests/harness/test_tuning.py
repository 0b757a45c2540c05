"""Tuning: the same trials for each method, and the same end after a stop."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.runs import Choice, Jobs
from benchmarks.harness.study import StudyError
from benchmarks.harness.tuning import OptunaTuner
from tests.harness.studies import DYNAMIC, LORA, TUNE, make_jobs

Value = Callable[[int, Choice], float | None]


class Measured:
    """Collects the tried choices and returns invented values."""

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
    folder.mkdir(exist_ok=True)
    return make_jobs(folder, tune={**TUNE, **changes})


def tuner_of(jobs: Jobs) -> OptunaTuner:
    assert jobs.study.tune is not None
    return OptunaTuner(jobs, jobs.study.tune)


def test_every_method_gets_the_same_first_trials(tmp_path):
    jobs = jobs_of(tmp_path, trials=5)
    tuner = tuner_of(jobs)
    lora, dynamic = Measured(far_from(0.02)), Measured(far_from(0.002))
    best = tuner.tune(LORA, lora)
    tuner.tune(DYNAMIC, dynamic)
    assert lora.tried[0] == jobs.defaults(LORA) == Choice(learning_rate=1e-2, scale=2.0)
    assert lora.tried == dynamic.tried, "the sampler has learned nothing after five trials"
    assert len(set(lora.tried)) == 5
    assert all(1e-3 <= c.learning_rate <= 1e-1 and 1 <= c.scale <= 8 for c in lora.tried)
    assert best == min(lora.tried, key=lambda choice: far_from(0.02)(0, choice) or 0.0)


@pytest.mark.parametrize(("metric", "pick"), [("loss", min), ("accuracy", max)])
def test_the_metric_decides_whether_less_is_better(tmp_path, metric, pick):
    measured = Measured(lambda _, choice: choice.learning_rate)
    best = tuner_of(jobs_of(tmp_path, metric=metric, trials=6)).tune(LORA, measured)
    assert best == pick(measured.tried, key=lambda choice: choice.learning_rate)


def test_a_search_is_for_the_loss_or_the_metric_of_the_task(tmp_path):
    assert jobs_of(tmp_path).metric(LORA) == "loss"
    assert jobs_of(tmp_path, metric=None).metric(LORA) == "accuracy"


def test_a_stop_changes_no_proposal(tmp_path):
    straight = Measured(far_from(0.02))
    tuner_of(jobs_of(tmp_path / "a", trials=13)).tune(LORA, straight)
    for ends in (2, 11):  # before and after the sampler learns from trials

        def stop(number: int, choice: Choice, ends: int = ends) -> float | None:
            return None if number == ends else far_from(0.02)(number, choice)

        stopped = Measured(stop)
        with pytest.raises(StudyError, match=rf"is not tuned: {ends} of 13 trials have ended"):
            tuner_of(jobs_of(tmp_path / "b", trials=13)).tune(LORA, stopped)
        assert stopped.tried == straight.tried[: ends + 1]


def test_another_number_of_trials_begins_with_those_of_the_record(tmp_path):
    def later_is_better(number: int, _choice: Choice) -> float:
        return -number

    first, more = Measured(later_is_better), Measured(later_is_better)
    assert tuner_of(jobs_of(tmp_path, trials=2)).tune(LORA, first) == first.tried[1]
    assert tuner_of(jobs_of(tmp_path, trials=4)).tune(LORA, more) == more.tried[3]
    assert more.tried[:2] == first.tried


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_a_diverged_trial_is_never_the_choice(tmp_path, metric):
    jobs = jobs_of(tmp_path, metric=metric)
    measured = Measured(lambda number, _: math.inf if number != 1 else 5.0)
    assert tuner_of(jobs).tune(LORA, measured) == measured.tried[1]
    with pytest.raises(StudyError, match=r"dynamic/r2 cannot be .* all of its 3 trials"):
        tuner_of(jobs).tune(DYNAMIC, Measured(lambda *_: math.inf))


def test_a_value_without_a_space_stays_and_a_list_is_kept_to(tmp_path):
    measured = Measured(far_from(0.02))
    tuner_of(jobs_of(tmp_path, scale=None)).tune(LORA, measured)
    assert {choice.scale for choice in measured.tried} == {2.0}
    assert len({choice.learning_rate for choice in measured.tried}) == 3
    listed = Measured(far_from(0.02))
    tuner_of(jobs_of(tmp_path, trials=8, scale={"choices": [1, 2, 4]})).tune(LORA, listed)
    assert {choice.scale for choice in listed.tried} <= {1.0, 2.0, 4.0}
    assert listed.tried[0].scale == 2.0
