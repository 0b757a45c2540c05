"""Step 4b. Each method over all cells of a study: counts of verdicts, and one test of the mean.

The test over all cells asks one question a method and not one a cell, so that fewer seeds can
answer it: six, with one method. Runs of one seed share the order of their data, so a seed counts
once, with its mean over cells.
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
    """A method in one quantity over all cells of a study; in gains, more is better."""

    method: str
    quantity: Quantity
    verdicts: tuple[Verdict, ...]
    """One a cell, after the correction."""
    intervals: tuple[Verdict, ...]
    """One a cell, by the interval alone."""
    gain: float | None
    """Mean over the seeds of `means`; without one, over what each cell has. None without a pair."""
    means: tuple[float, ...]
    """Mean gain over cells of each seed that has a pair in every cell; the rest is about them."""
    lost: int
    """Pairs without a result, in all cells together."""
    interval: tuple[float, float] | None
    """None with fewer than six seeds."""
    p: float | None
    """None with fewer than two seeds."""
    corrected: float | None = None
    """After Holm's correction over the study's methods in this quantity."""

    @property
    def verdict(self) -> Verdict:
        """Return what is shown over all cells together."""
        return judge(sum(self.means), self.corrected, self.lost)


def standings(comparisons: Sequence[Comparison]) -> list[Standing]:
    """Return where each method stands, in the order of methods and quantities."""
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
