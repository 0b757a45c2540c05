"""Step 4. Methods compared with a reference, cell by cell, over the seeds that both have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean

from benchmarks.harness.report.record import Cell, Outcome
from benchmarks.harness.report.statistics import bootstrap_interval, holm, sign_flip_p
from benchmarks.harness.report.study import Study
from dynlora.report.wording import lower_is_better

LEVEL = 0.05
"""Corrected p-value up to which a difference counts as shown."""
LEAST_PAIRS = 2
"""Fewest pairs of which a p-value is given."""
INTERVAL_PAIRS = 6
"""Fewest pairs of which an interval is given. Of normal differences it would hold the mean in about
73 % of studies with three pairs and 84 % with five; and no p-value of so few is below 0.06."""


class Quantity(StrEnum):
    """What is compared; the correction for many comparisons is made for each of them."""

    LOSS = "validation loss"
    METRIC = "validation metric"
    TEST_LOSS = "test loss"
    TEST = "test metric"


class Verdict(StrEnum):
    """What a comparison shows."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "no difference shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A method against the reference, in one cell and quantity."""

    cell: Cell
    method: str
    quantity: Quantity
    metric: str
    """The name of what was measured, such as `loss` or `accuracy`."""
    differences: Mapping[int, float]
    """Method minus reference, by seed and in its order."""
    lost: int
    """Seeds that both have, but of which one has no finite result: it failed, say, or diverged."""
    interval: tuple[float, float] | None
    """None where there are fewer than six pairs."""
    p: float | None
    """None where there are fewer than two pairs."""
    corrected: float | None = None
    """The p-value after Holm's correction over the study's comparisons of this quantity."""

    @property
    def mean(self) -> float:
        """The mean difference; NaN without a pair."""
        return fmean(self.differences.values()) if self.differences else math.nan

    @property
    def gain(self) -> float:
        """The mean difference with the sign turned so that more is better."""
        return self.mean * self.sign

    @property
    def sign(self) -> int:
        """What a difference is multiplied with so that more is better."""
        return -1 if lower_is_better(self.metric) else 1

    @property
    def verdict(self) -> Verdict:
        """Return what is shown after the correction."""
        return judge(self.gain, self.corrected, self.lost)

    @property
    def interval_says(self) -> Verdict:
        """Return what the interval alone would show, without a correction."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return Verdict.OPEN
        return Verdict.BETTER if self.gain > 0 else Verdict.WORSE


def judge(gain: float, corrected: float | None, lost: int) -> Verdict:
    """Return what a gain shows.

    Args:
        gain: The mean difference, turned so that more is better.
        corrected: Its p-value after the correction; None stands for no test.
        lost: Pairs that are left out because a run has no result: that may be the worst of all, so
            that the rest show nothing.
    """
    if corrected is None or corrected > LEVEL or lost:
        return Verdict.OPEN
    return Verdict.BETTER if gain > 0 else Verdict.WORSE


def value_of(outcome: Outcome, quantity: Quantity) -> float | None:
    """Return an outcome's value; None without test data.

    Where the main metric is the loss itself, the loss is counted once.
    """
    match quantity:
        case Quantity.LOSS:
            return outcome.loss
        case Quantity.METRIC:
            return None if outcome.main_metric == "loss" else outcome.metric
        case Quantity.TEST_LOSS:
            return None if outcome.main_metric == "loss" else outcome.test_loss
        case Quantity.TEST:
            return outcome.test


def compare(study: Study, reference: str) -> list[Comparison]:
    """Return every comparison of a study: by cell, then method, then quantity.

    A method without a run in a cell, or a cell without one of the reference, gives none. Every
    other has its loss compared, even if no seed is left for it; other quantities where there are
    some.
    """
    found = [
        _compare_one(study, cell, method, reference, quantity)
        for cell in study.cells
        if study.runs(cell, reference)
        for method in study.methods(first=reference)[1:]
        if study.runs(cell, method)
        for quantity in Quantity
    ]
    return _corrected([comparison for comparison in found if comparison])


def differences_by_seed(
    ours: Mapping[int, Outcome], theirs: Mapping[int, Outcome], quantity: Quantity
) -> dict[int, float]:
    """Return ours minus theirs by seed, in its order, where both have the quantity."""
    pairs = {
        seed: (value_of(ours[seed], quantity), value_of(theirs[seed], quantity))
        for seed in sorted(ours.keys() & theirs.keys())
    }
    return {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}


def metric_of(study: Study, setting: tuple[str, str], quantity: Quantity) -> str:
    """Return the name of what a quantity measures: `loss`, or the task's main metric."""
    return "loss" if quantity in (Quantity.LOSS, Quantity.TEST_LOSS) else study.metric(setting)


def _compare_one(
    study: Study, cell: Cell, method: str, reference: str, quantity: Quantity
) -> Comparison | None:
    ours, theirs = study.usable(cell, method), study.usable(cell, reference)
    differences = differences_by_seed(ours, theirs, quantity)
    values = list(differences.values())
    if not differences and quantity is not Quantity.LOSS:
        return None
    return Comparison(
        cell=cell,
        method=method,
        quantity=quantity,
        metric=metric_of(study, (cell.model, cell.task), quantity),
        differences=differences,
        lost=lost_pairs(study, (cell, method), (cell, reference)),
        interval=bootstrap_interval(values) if len(values) >= INTERVAL_PAIRS else None,
        p=sign_flip_p(values) if len(values) >= LEAST_PAIRS else None,
    )


def lost_pairs(study: Study, ours: tuple[Cell, str], theirs: tuple[Cell, str]) -> int:
    """Return how many seeds both have, but with a result for one of them at most.

    Args:
        study: Holds the runs.
        ours: Cell and method.
        theirs: The same of what it is compared with.
    """
    tried = [{run.seed for run in study.runs(*side)} for side in (ours, theirs)]
    finite = study.usable(*ours).keys() & study.usable(*theirs).keys()
    return len((tried[0] & tried[1]) - finite)


def pairs_text(pairs: int, lost: int) -> str:
    """Return how many pairs there are, and how many were lost."""
    return f"{pairs} ({lost} lost)" if lost else str(pairs)


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    done: dict[int, float] = {}
    for quantity in Quantity:
        tested = [
            (place, c.p)
            for place, c in enumerate(comparisons)
            if c.quantity is quantity and c.p is not None
        ]
        corrected = holm([p for _, p in tested])
        done |= dict(zip((place for place, _ in tested), corrected, strict=True))
    return [replace(c, corrected=done.get(place)) for place, c in enumerate(comparisons)]
