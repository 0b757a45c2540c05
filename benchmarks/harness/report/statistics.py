"""Step 3. Paired differences judged: an interval, a p-value, and a correction for many of them.

Every function starts from a fixed seed, so that a number never depends on what was computed
before it.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri

RESAMPLES = 10_000
"""Resamples of a bootstrap."""
CONFIDENCE = 0.95
MOST_EXACT = 16
"""Most pairs of which every pattern of signs is tried: 65,536 patterns."""
SAMPLED_FLIPS = 100_000
"""Patterns of signs that are drawn where there are too many to try all."""
SEED = 20_260_101
FLIPS_AT_ONCE = 10_000
SAME = 1e-9
"""Part of the largest sum up to which two sums count as equal: the same numbers added in another
order differ in their last digits."""


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the BCa bootstrap interval of a mean: bias-corrected, and accelerated by a jackknife.

    Differences that are all equal give that value twice: nothing in them says how far it is from
    the truth.

    Args:
        differences: At least two finite numbers.

    Returns:
        The lower and upper end, which hold the mean in 95 % of studies if there are many pairs;
        with ten or fewer the interval is somewhat too narrow.
    """
    values = np.asarray(differences, dtype=np.float64)
    if np.ptp(values) <= SAME * np.abs(values).max():
        return float(values.mean()), float(values.mean())
    drawn = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    means, mean = values[drawn].mean(axis=1), values.mean()
    same = SAME * np.abs(values).max()
    bias = ndtri(((means < mean - same).mean() + (means <= mean + same).mean()) / 2)
    away = (values - mean) / (len(values) - 1)  # from the mean of the jackknife's means
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    quantiles = bias + ndtri([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.quantile(means, ndtr(bias + quantiles / (1 - acceleration * quantiles)))
    return float(low), float(high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a mean of 0 by a permutation test of signs.

    If two methods do not differ, each pair's difference could as well have the other sign. The
    p-value is the part of all patterns of signs whose mean is as far from 0 as the one seen. Up
    to 16 pairs every pattern is tried; beyond, 100,000 are drawn and the one seen is added.

    Args:
        differences: At least one finite number.
    """
    values = np.asarray(differences, dtype=np.float64)
    least = abs(values.sum()) - SAME * np.abs(values).sum()
    if len(values) <= MOST_EXACT:
        bits = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
        signs = bits * 2.0 - 1.0
        return float((np.abs(signs @ values) >= least).mean())
    draws, count = np.random.default_rng(SEED), 0
    for _ in range(SAMPLED_FLIPS // FLIPS_AT_ONCE):
        signs = draws.integers(0, 2, (FLIPS_AT_ONCE, len(values))) * 2.0 - 1.0
        count += int((np.abs(signs @ values) >= least).sum())
    return (count + 1) / (SAMPLED_FLIPS + 1)


def least_p(pairs: int) -> float:
    """Return the smallest p-value that `sign_flip_p` can give for a number of pairs."""
    return 2.0 / 2**pairs if pairs <= MOST_EXACT else 1 / (SAMPLED_FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down rule, in the same order.

    Rejecting what is at most 0.05 keeps the chance of a single false claim among all of them
    below 5 %, however they depend on each other.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, highest = [0.0] * len(p_values), 0.0
    for done, place in enumerate(order):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - done)))
        corrected[place] = highest
    return corrected
