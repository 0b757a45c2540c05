"""Step 4b. Each method over all cells of a study: counts of verdicts, and one test of the mean.

One test per method, not per cell, needs fewer seeds: six with a single method. Runs of one seed
share the order of their data, so each seed contributes one value, its mean over cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from benchmarks.harness.report.comparison import (
    INTERVAL_PAIRS,
    LEAST_PAIRS,
    Comparison,
    Quantity,
    Verdict,
    judge,
)
from benchmarks.harness.report.statistics import bootstrap_interval, holm, sign_flip_p


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


def standings(comparisons: Sequence[Comparison]) -> list[Standing]:
    """Return each method's standing per quantity, sorted by method and quantity."""
    methods = list(dict.fromkeys(found.method for found in comparisons))
    found: list[Standing] = []
    for quantity in Quantity:
        groups = [
            [c for c in comparisons if c.method == method and c.quantity is quantity]
            for method in methods
        ]
        found += _corrected([_standing(group) for group in groups if group])
    return sorted(found, key=lambda standing: methods.index(standing.method))


def _standing(group: Sequence[Comparison]) -> Standing:
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


def _corrected(group: Sequence[Standing]) -> list[Standing]:
    tested = [standing for standing in group if standing.p is not None]
    values = iter(holm([standing.p for standing in tested if standing.p is not None]))
    return [s if s.p is None else replace(s, corrected=next(values)) for s in group]
