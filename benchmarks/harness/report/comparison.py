"""Step 4. Compare methods with a reference, per cell and over all cells of a study.

In a cell, runs are paired by seed. Over all cells there is one test per method, which needs fewer
seeds than one per cell: six with a single method. Runs of one seed share the order of their data,
so each seed contributes one value, its mean over cells.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean

from benchmarks.harness.report.results import Cell, Scores, StudyResults
from benchmarks.harness.report.statistics import bootstrap_interval, holm, sign_flip_p
from dynlora.report.wording import lower_is_better

LEVEL = 0.05
"""Maximum corrected p-value of a significant difference."""
LEAST_PAIRS = 2
"""Minimum number of pairs for a p-value."""
INTERVAL_PAIRS = 6
"""Minimum number of pairs for an interval. For normal differences its coverage would be about 73 %
with three pairs and 84 % with five, and no p-value is below 0.06 with so few."""


class Quantity(StrEnum):
    """Quantity to compare; the correction for multiple comparisons applies to each separately."""

    LOSS = "validation loss"
    METRIC = "validation metric"
    TEST_LOSS = "test loss"
    TEST = "test metric"


class Verdict(StrEnum):
    """Result of a comparison."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "no difference shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """A method compared with the reference, in one cell and quantity."""

    cell: Cell
    method: str
    quantity: Quantity
    metric: str
    """Name of the measured value, such as `loss` or `accuracy`."""
    differences: Mapping[int, float]
    """Method minus reference, by seed, sorted by seed."""
    lost: int
    """Common seeds where at least one run has no finite result, for example because it failed."""
    interval: tuple[float, float] | None
    """None with fewer than six pairs."""
    p: float | None
    """None with fewer than two pairs."""
    corrected: float | None = None
    """p-value after Holm's correction over the study's comparisons of this quantity."""

    @property
    def mean(self) -> float:
        """Mean difference; NaN without pairs."""
        return fmean(self.differences.values()) if self.differences else math.nan

    @property
    def gain(self) -> float:
        """Mean difference, with its sign such that more is better."""
        return self.mean * self.sign

    @property
    def sign(self) -> int:
        """Factor on differences such that more is better."""
        return -1 if lower_is_better(self.metric) else 1

    @property
    def verdict(self) -> Verdict:
        """Verdict after the correction."""
        return judge(self.gain, self.corrected, self.lost)

    @property
    def interval_says(self) -> Verdict:
        """Verdict by the interval only, without correction."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return Verdict.OPEN
        return Verdict.BETTER if self.gain > 0 else Verdict.WORSE


def judge(gain: float, corrected: float | None, lost: int) -> Verdict:
    """Return the verdict on a gain.

    Args:
        gain: Mean difference, with its sign such that more is better.
        corrected: Corrected p-value; None without a test.
        lost: Pairs without a result. Any lost pair makes the verdict open, because the missing run
            may be the worst.
    """
    if corrected is None or corrected > LEVEL or lost:
        return Verdict.OPEN
    return Verdict.BETTER if gain > 0 else Verdict.WORSE


def value_of(scores: Scores, quantity: Quantity) -> float | None:
    """Return a run's value of a quantity; None without test data.

    If the main metric is the loss, it counts only once.
    """
    if scores.main_metric == "loss" and quantity in (Quantity.METRIC, Quantity.TEST_LOSS):
        return None
    found = scores.validation if quantity in (Quantity.LOSS, Quantity.METRIC) else scores.test
    is_loss = quantity in (Quantity.LOSS, Quantity.TEST_LOSS)
    return None if found is None else found["loss" if is_loss else scores.main_metric]


def compare(study: StudyResults, reference: str) -> list[PairedComparison]:
    """Return all comparisons of a study, by cell, method and quantity.

    Cells need runs of both method and reference. The validation loss is always compared, other
    quantities only if a seed has both values.
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
    ours: Mapping[int, Scores], theirs: Mapping[int, Scores], quantity: Quantity
) -> dict[int, float]:
    """Return ours minus theirs for common seeds, sorted by seed."""
    pairs = {
        seed: (value_of(ours[seed], quantity), value_of(theirs[seed], quantity))
        for seed in sorted(ours.keys() & theirs.keys())
    }
    return {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}


def metric_of(study: StudyResults, setting: tuple[str, str], quantity: Quantity) -> str:
    """Return the name of a quantity's measure: `loss`, or the task's main metric."""
    return "loss" if quantity in (Quantity.LOSS, Quantity.TEST_LOSS) else study.metric(setting)


def _compare_one(
    study: StudyResults, cell: Cell, method: str, reference: str, quantity: Quantity
) -> PairedComparison | None:
    ours, theirs = study.usable(cell, method), study.usable(cell, reference)
    differences = differences_by_seed(ours, theirs, quantity)
    values = list(differences.values())
    if not differences and quantity is not Quantity.LOSS:
        return None
    return PairedComparison(
        cell=cell,
        method=method,
        quantity=quantity,
        metric=metric_of(study, (cell.model, cell.task), quantity),
        differences=differences,
        lost=lost_pairs(study, (cell, method), (cell, reference)),
        interval=bootstrap_interval(values) if len(values) >= INTERVAL_PAIRS else None,
        p=sign_flip_p(values) if len(values) >= LEAST_PAIRS else None,
    )


def lost_pairs(study: StudyResults, ours: tuple[Cell, str], theirs: tuple[Cell, str]) -> int:
    """Return the number of common seeds where at least one run has no finite result.

    Args:
        study: The study.
        ours: Cell and method.
        theirs: Cell and method to compare with.
    """
    tried = [{result.run.seed for result in study.runs(*side)} for side in (ours, theirs)]
    finite = study.usable(*ours).keys() & study.usable(*theirs).keys()
    return len((tried[0] & tried[1]) - finite)


def pairs_text(pairs: int, lost: int) -> str:
    """Format the numbers of pairs and of lost pairs."""
    return f"{pairs} ({lost} lost)" if lost else str(pairs)


def _corrected(comparisons: Sequence[PairedComparison]) -> list[PairedComparison]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A method's results in one quantity over all cells of a study; larger gains are better."""

    method: str
    quantity: Quantity
    verdicts: tuple[Verdict, ...]
    """One per cell, after the correction."""
    intervals: tuple[Verdict, ...]
    """One per cell, by the interval only."""
    gain: float | None
    """Mean of `means`; if empty, the mean gain over cells with pairs. None without pairs."""
    means: tuple[float, ...]
    """Mean gain over cells per seed with a pair in every cell; basis of interval and p-value."""
    lost: int
    """Pairs without a result, in all cells."""
    interval: tuple[float, float] | None
    """None with fewer than six seeds."""
    p: float | None
    """None with fewer than two seeds."""
    corrected: float | None = None
    """After Holm's correction over the study's methods in this quantity."""

    @property
    def verdict(self) -> Verdict:
        """Verdict over all cells."""
        return judge(sum(self.means), self.corrected, self.lost)


def standings(comparisons: Sequence[PairedComparison]) -> list[Standing]:
    """Return each method's standing per quantity, sorted by method and quantity."""
    methods = list(dict.fromkeys(found.method for found in comparisons))
    found: list[Standing] = []
    for quantity in Quantity:
        groups = [
            [c for c in comparisons if c.method == method and c.quantity is quantity]
            for method in methods
        ]
        found += _corrected_standings([_standing(group) for group in groups if group])
    return sorted(found, key=lambda standing: methods.index(standing.method))


def _standing(group: Sequence[PairedComparison]) -> Standing:
    seeds = sorted(set.intersection(*(set(found.differences) for found in group)))
    means = [fmean(found.sign * found.differences[seed] for found in group) for seed in seeds]
    gains = means or [found.gain for found in group if found.differences]
    return Standing(
        method=group[0].method,
        quantity=group[0].quantity,
        verdicts=tuple(found.verdict for found in group),
        intervals=tuple(found.interval_says for found in group),
        gain=fmean(gains) if gains else None,
        means=tuple(means),
        lost=sum(found.lost for found in group),
        interval=bootstrap_interval(means) if len(means) >= INTERVAL_PAIRS else None,
        p=sign_flip_p(means) if len(means) >= LEAST_PAIRS else None,
    )


def _corrected_standings(group: Sequence[Standing]) -> list[Standing]:
    tested = [standing for standing in group if standing.p is not None]
    values = iter(holm([standing.p for standing in tested if standing.p is not None]))
    return [s if s.p is None else replace(s, corrected=next(values)) for s in group]
