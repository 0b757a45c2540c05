"""Step 3. Test paired differences: interval, p-value, and correction for multiple comparisons.

Every function uses a fixed seed, so that its result does not depend on earlier calls.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 10_000
"""Bootstrap resamples."""
CONFIDENCE = 0.95
SIGN_PATTERNS = 99_999
"""Maximum number of sign patterns in a permutation test: all of them up to 16 pairs, beyond that a
random sample."""
SEED = 20_260_101
SAME = 1e-9
"""Tolerance for equal values, relative to the largest, because rounding changes the last digits."""


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the BCa bootstrap interval of a mean.

    If all differences are equal, both ends are that value, because the data has no spread.

    Args:
        differences: At least two finite numbers.

    Returns:
        The lower and upper end. Coverage is 95 % with many pairs, and lower with ten or fewer.
    """
    values = np.asarray(differences, dtype=np.float64)
    if np.ptp(values) <= SAME * np.abs(values).max():
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values,), _rounded_mean(values), n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
        method="BCa", vectorized=True, rng=np.random.default_rng(SEED),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a zero mean by a permutation test of signs.

    If two methods do not differ, each difference is equally likely with either sign. The p-value is
    the share of sign patterns with a mean at least as far from 0 as the observed one.

    Args:
        differences: At least two finite numbers.
    """
    values = np.asarray(differences, dtype=np.float64)
    found = stats.permutation_test(
        (values,), _rounded_mean(values), permutation_type="samples", n_resamples=SIGN_PATTERNS,
        vectorized=True, rng=np.random.default_rng(SEED),
    )  # fmt: skip
    return float(found.pvalue)


def _rounded_mean(values: np.ndarray) -> Callable[..., Any]:
    """Return a mean that is equal for equal samples in any order, in spite of rounding."""
    unit = SAME * (np.abs(values).max() or 1.0)

    def mean(sample: np.ndarray, axis: int = -1) -> Any:  # a number if there is one axis
        return unit * np.round(sample.mean(axis=axis) / unit)

    return mean


def least_p(pairs: int) -> float:
    """Return the smallest possible result of `sign_flip_p` for a number of pairs."""
    return 2 / 2**pairs if 2**pairs <= SIGN_PATTERNS else 2 / (SIGN_PATTERNS + 1)


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
