"""Step 3. Test paired differences: interval, p-value, and correction for multiple comparisons.

Every function uses a fixed seed, so that its result does not depend on earlier calls.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri

RESAMPLES = 10_000
"""Bootstrap resamples."""
CONFIDENCE = 0.95
MOST_EXACT = 16
"""Maximum number of pairs with all sign patterns enumerated (65,536)."""
SAMPLED_FLIPS = 100_000
"""Number of random sign patterns for more pairs."""
SEED = 20_260_101
FLIPS_AT_ONCE = 10_000
SAME = 1e-9
"""Tolerance for equal sums, relative to the largest sum, because the order of addition changes the
last digits."""


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the BCa bootstrap interval of a mean: bias-corrected, and accelerated by a jackknife.

    If all differences are equal, both ends are that value, because the data has no spread.

    Args:
        differences: At least two finite numbers.

    Returns:
        The lower and upper end. Coverage is 95 % with many pairs, and lower with ten or fewer.
    """
    values = np.asarray(differences, dtype=np.float64)
    if np.ptp(values) <= SAME * np.abs(values).max():
        return float(values.mean()), float(values.mean())
    drawn = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    means, mean = values[drawn].mean(axis=1), values.mean()
    same = SAME * np.abs(values).max()
    bias = ndtri(((means < mean - same).mean() + (means <= mean + same).mean()) / 2)
    away = (values - mean) / (len(values) - 1)  # deviations of the jackknife means
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    quantiles = bias + ndtri([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.quantile(means, ndtr(bias + quantiles / (1 - acceleration * quantiles)))
    return float(low), float(high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a zero mean by a permutation test of signs.

    If two methods do not differ, each difference is equally likely with either sign. The p-value is
    the share of sign patterns with a mean at least as far from 0 as the observed one. Up to 16
    pairs all patterns are enumerated; beyond, 100,000 are sampled and the observed one is added.

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
    """Return the smallest possible result of `sign_flip_p` for a number of pairs."""
    return 2.0 / 2**pairs if pairs <= MOST_EXACT else 1 / (SAMPLED_FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's step-down rule, in the same order.

    Rejecting corrected values up to 0.05 bounds the probability of any false claim by 5 %, for any
    dependence between the tests.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, highest = [0.0] * len(p_values), 0.0
    for done, place in enumerate(order):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - done)))
        corrected[place] = highest
    return corrected
