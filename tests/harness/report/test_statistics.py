"""Intervals, permutation p-values and Holm's correction against independent oracles."""

import itertools
import warnings

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness.report.statistics import (
    SAMPLED_FLIPS,
    bootstrap_interval,
    holm,
    least_p,
    sign_flip_p,
)

SKEWED = [0.01, 0.02, -0.01, 0.05, 0.2, 0.03, 0.04, -0.02, 0.015, 0.6]


def normal(count: int, mean: float = 0.0, seed: int = 0) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean, 1.0, count))


@pytest.mark.parametrize("values", [SKEWED, normal(6, 1.0), normal(40)], ids=len)
def test_the_interval_is_scipys_bca_interval(values):
    ours = bootstrap_interval(values)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)


def test_the_bca_interval_of_skewed_values_reaches_further_up_than_the_percentile_interval():
    percentile = stats.bootstrap(
        (SKEWED,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = bootstrap_interval(SKEWED)
    assert high > percentile.high + 0.05
    assert low > percentile.low


def test_the_interval_of_many_normal_values_is_the_textbook_one():
    values = normal(400)
    half = 1.96 * np.std(values, ddof=1) / 20
    middle = np.mean(values)
    assert bootstrap_interval(values) == pytest.approx((middle - half, middle + half), abs=0.01)


def test_nineteen_in_twenty_intervals_hold_the_mean():
    held = 0
    for seed in range(200):
        low, high = bootstrap_interval(normal(20, 3.0, seed))
        held += low <= 3.0 <= high
    # Of 200 the standard error is 3; with 20 pairs the bootstrap is known to be a bit narrow.
    assert 176 <= held <= 198


@pytest.mark.parametrize(("pairs", "percent"), [(3, 73), (5, 84), (10, 90)])
def test_intervals_of_few_pairs_hold_the_mean_as_often_as_the_report_says(pairs, percent):
    held = 0
    for seed in range(600):
        low, high = bootstrap_interval(normal(pairs, 3.0, seed))
        held += low <= 3.0 <= high
    # The standard error is 1.2 to 1.8 percent.
    assert held / 6 == pytest.approx(percent, abs=5)


def test_the_interval_follows_the_values_when_they_are_moved_scaled_or_turned():
    low, high = bootstrap_interval(SKEWED)
    moved = bootstrap_interval([2 * value + 1 for value in SKEWED])
    assert moved == pytest.approx((2 * low + 1, 2 * high + 1))
    turned = bootstrap_interval([-value for value in SKEWED])
    assert turned == pytest.approx((-high, -low), abs=0.01)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_equal_differences_have_an_interval_of_no_width_and_no_warning(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_interval([value] * 3) == pytest.approx((value, value))
        assert bootstrap_interval([0.1 + 0.2, 0.3]) == pytest.approx((0.3, 0.3))


def test_the_interval_is_the_same_whatever_was_computed_before():
    first = bootstrap_interval(SKEWED)
    np.random.default_rng(5).normal(size=3)
    bootstrap_interval(normal(5))
    assert bootstrap_interval(SKEWED) == first


def test_the_interval_of_two_pairs_lies_between_them():
    low, high = bootstrap_interval([1.0, 3.0])
    assert 1.0 <= low < high <= 3.0


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([1.0], 1.0),  # either sign is as far from 0
        ([1.0, 2.0], 0.5),  # of 3, 1, -1, -3 two
        ([1.0, 2.0, 3.0], 0.25),  # of eight sums only 6 and -6 reach 6
        ([1.0, 2.0, -3.0], 1.0),  # the sum is 0
        ([1.0, 1.0, 1.0, -1.0], 0.625),  # 2 + 2 * 4 of 16 patterns have a sum of 2 or more
        ([0.0, 0.0, 0.0], 1.0),
        ([0.1, 0.2, -0.3 - 1e-17], 1.0),  # 0 but for rounding
    ],
)
def test_the_p_value_is_that_counted_by_hand(values, p):
    assert sign_flip_p(values) == p


@pytest.mark.parametrize("count", [5, 10, 16])
def test_the_exact_p_value_is_scipys(count):
    values = normal(count, 0.4)
    theirs = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=np.inf, rng=0
    )
    assert sign_flip_p(values) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_equal_sizes_give_the_p_value_of_the_sign_test():
    values = [0.1] * 9 + [-0.1] * 3
    assert sign_flip_p(values) == pytest.approx(stats.binomtest(3, 12).pvalue)


def test_more_than_sixteen_pairs_give_a_sampled_p_value_near_the_exact_one():
    values = normal(20, 0.45)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=10)))
    halves = signs @ np.array(values[:10]), signs @ np.array(values[10:])
    sums = np.abs(halves[0][:, None] + halves[1][None, :])
    exact = (sums >= abs(sum(values)) - 1e-9).mean()
    assert 0.01 < exact < 0.2
    assert sign_flip_p(values) == pytest.approx(exact, abs=0.003)
    assert sign_flip_p(values) == sign_flip_p(values)


def test_a_sampled_p_value_is_never_zero():
    assert sign_flip_p([1.0] * 40) == 1 / (SAMPLED_FLIPS + 1)


@pytest.mark.parametrize("pairs", [1, 2, 10, 16, 17])
def test_the_least_p_is_that_of_pairs_that_all_point_one_way(pairs):
    values = [1.0 + 0.01 * n for n in range(pairs)]
    # 2 of 2**17 patterns are as extreme; in 100,000 draws they are seen once or twice, or never.
    most = 6 / SAMPLED_FLIPS if pairs == 17 else least_p(pairs)
    assert least_p(pairs) <= sign_flip_p(values) <= most


def test_under_no_difference_p_values_are_at_most_as_small_as_they_say():
    p_values = [sign_flip_p(normal(8, 0.0, seed)) for seed in range(400)]
    assert sum(p <= 0.05 for p in p_values) <= 0.05 * 400 + 3 * (400 * 0.05 * 0.95) ** 0.5
    assert 0.4 < np.mean(p_values) < 0.6


@pytest.mark.parametrize(
    ("given", "corrected"),
    [
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # R: p.adjust(p, "holm")
        ([0.03, 0.01], [0.03, 0.02]),  # the order is that of the input
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.4, 0.9], [0.8, 0.9]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.04], [0.04]),
        ([], []),
    ],
)
def test_holms_correction_is_that_computed_by_hand(given, corrected):
    assert holm(given) == pytest.approx(corrected)
