"""Agreement of rank patterns against scipy and by hand."""

import itertools
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness.report.agreement import agreement


def patterns(*ranks: list[int]) -> list[dict[str, int]]:
    return [{f"layer.{n}": rank for n, rank in enumerate(row)} for row in ranks]


def random_ranks(seeds: int, layers: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(1, 9, (seeds, layers)).tolist()


@pytest.mark.parametrize(("seeds", "layers"), [(2, 12), (5, 36), (10, 8)])
def test_spearman_is_scipys_in_the_mean_over_pairs(seeds, layers):
    ranks = random_ranks(seeds, layers)
    found = agreement(patterns(*ranks))
    assert found
    theirs = fmean(
        float(stats.spearmanr(a, b).statistic) for a, b in itertools.combinations(ranks, 2)
    )
    assert found.spearman == pytest.approx(theirs)


@pytest.mark.parametrize(("seeds", "layers"), [(3, 12), (5, 36), (10, 8)])
def test_kendalls_w_is_friedmans_statistic_over_its_largest_value(seeds, layers):
    ranks = random_ranks(seeds, layers)
    found = agreement(patterns(*ranks))
    assert found
    friedman = stats.friedmanchisquare(*np.array(ranks).T)
    assert found.kendall == pytest.approx(friedman.statistic / (seeds * (layers - 1)))


def test_the_same_order_agrees_fully_and_the_opposite_order_not_at_all():
    same = agreement(patterns([1, 2, 3], [2, 4, 9], [1, 5, 6]))
    assert same
    assert (same.spearman, same.kendall) == (pytest.approx(1.0), pytest.approx(1.0))
    opposite = agreement(patterns([1, 2, 3], [3, 2, 1]))
    assert opposite
    assert (opposite.spearman, opposite.kendall) == (pytest.approx(-1.0), pytest.approx(0.0))


def test_layers_are_matched_by_name_and_not_by_their_order():
    found = agreement([{"a": 1, "b": 2, "c": 3}, {"c": 3, "a": 1, "b": 2}])
    assert found
    assert found.spearman == pytest.approx(1.0)


def test_equal_ranks_are_said_to_be_equal():
    found = agreement(patterns([8, 8, 8], [8, 8, 8]))
    assert found
    assert found.all_equal
    assert (found.spearman, found.kendall) == (None, None)


def test_a_seed_with_equal_ranks_is_counted_and_in_no_pair():
    found = agreement(patterns([1, 2, 3], [4, 4, 4], [1, 2, 4]))
    assert found
    assert (found.constant, found.seeds, found.all_equal) == (1, 3, False)
    assert found.spearman == pytest.approx(1.0)


def test_one_seed_agrees_with_nothing():
    found = agreement(patterns([1, 2, 3]))
    assert found
    assert (found.spearman, found.kendall, found.all_equal) == (None, None, False)


def test_runs_of_different_layers_cannot_be_compared():
    assert agreement([{"a": 1, "b": 2}, {"a": 1, "c": 2}]) is None
