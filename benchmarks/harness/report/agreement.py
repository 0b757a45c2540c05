"""Step 5. Measure whether a method ranks the layers alike for all seeds."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Similarity of the rank patterns of several seeds."""

    seeds: int
    constant: int
    """Seeds with equal ranks on all layers, which have no order of layers."""
    spearman: float | None
    """Mean correlation over pairs of the other seeds; None with fewer than two."""
    kendall: float | None
    """Kendall's W of the other seeds, corrected for ties; None with fewer than two."""

    @property
    def all_equal(self) -> bool:
        """Whether all seeds have equal ranks on all layers."""
        return self.constant == self.seeds


def agreement(patterns: Sequence[Mapping[str, int]]) -> Agreement | None:
    """Return the agreement of several runs' final ranks; None if their layers differ.

    Args:
        patterns: Rank by module name per seed; at least one, none empty.
    """
    names = sorted(patterns[0])
    if any(sorted(pattern) != names for pattern in patterns):
        return None
    moved = [[pattern[name] for name in names] for pattern in patterns]
    moved = [ranks for ranks in moved if len(set(ranks)) > 1]
    orders = np.array([rankdata(ranks) for ranks in moved])
    several = len(moved) >= 2
    return Agreement(
        seeds=len(patterns),
        constant=len(patterns) - len(moved),
        spearman=mean_spearman(orders) if several else None,
        kendall=kendall_w(orders) if several else None,
    )


def mean_spearman(orders: np.ndarray) -> float:
    """Return the mean Spearman correlation over all pairs of seeds.

    Args:
        orders: Ranks of the layers' values, averaged over ties, of shape ``(seeds, layers)``.
    """
    away = orders - orders.mean(axis=1, keepdims=True)
    unit = away / np.linalg.norm(away, axis=1, keepdims=True)
    return fmean(float(a @ b) for a, b in itertools.combinations(unit, 2))


def kendall_w(orders: np.ndarray) -> float:
    """Return Kendall's coefficient of concordance: 0 for no agreement, 1 for the same order.

    Args:
        orders: Ranks of the layers' values, averaged over ties, of shape ``(seeds, layers)``.
    """
    seeds, layers = orders.shape
    sums = orders.sum(axis=0)
    counts = [np.unique(order, return_counts=True)[1] for order in orders]
    ties = sum(float((count**3 - count).sum()) for count in counts)
    spread = 12 * float(((sums - sums.mean()) ** 2).sum())
    return spread / float(seeds**2 * (layers**3 - layers) - seeds * ties)
