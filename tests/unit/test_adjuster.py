"""Whole ranks from shares against numbers worked out by hand, and the bounds of one layer."""

import re

import pytest

from dynlora.adjuster import LayerBounds, bound_layer, check_budget, limit_by_directions, plan_ranks
from dynlora.errors import BudgetError


def layer(cost=1, floor=1, ceiling=100, held=1):
    return LayerBounds(cost=cost, floor=floor, ceiling=ceiling, held=held)


def test_shares_that_divide_evenly_give_exactly_those_ranks():
    layers = {name: layer() for name in "abc"}
    ranks = plan_ranks({"a": 0.6, "b": 0.3, "c": 0.1}, layers, budget=10)
    assert ranks == {"a": 6, "b": 3, "c": 1}


def test_remainders_follow_the_webster_divisor_rule():
    # Quotients w / (k - 1/2): a 10.6 3.53 2.12 1.51, b 6.6 2.2 1.32, c 2.8 0.93; the 7 largest.
    layers = {name: layer() for name in "abc"}
    ranks = plan_ranks({"a": 5.3, "b": 3.3, "c": 1.4}, layers, budget=7)
    assert ranks == {"a": 4, "b": 2, "c": 1}


@pytest.mark.parametrize(("share", "rank"), [(1.64, 2), (1.69, 3)])
def test_a_third_rank_needs_five_thirds_of_the_share_that_a_second_needs(share, rank):
    layers = {"a": layer(), "b": layer()}
    assert plan_ranks({"a": 1.0, "b": share}, layers, budget=4) == {"a": 4 - rank, "b": rank}


def test_equal_shares_per_parameter_give_equal_ranks_whatever_the_cost():
    layers = {"small": layer(cost=10), "large": layer(cost=70)}
    ranks = plan_ranks({"small": 1 / 8, "large": 7 / 8}, layers, budget=80 * 5)
    assert ranks == {"small": 5, "large": 5}


def test_what_a_full_layer_cannot_take_goes_to_the_others():
    layers = {"a": layer(ceiling=2), "b": layer(), "c": layer()}
    ranks = plan_ranks({"a": 0.8, "b": 0.1, "c": 0.1}, layers, budget=12)
    assert ranks == {"a": 2, "b": 5, "c": 5}


def test_ties_go_to_the_smaller_rank_then_to_the_name():
    layers = {"b": layer(floor=2), "a": layer(floor=1), "c": layer(floor=1)}
    equal = {"a": 0.0, "b": 0.0, "c": 0.0}
    assert plan_ranks(equal, layers, budget=5) == {"a": 2, "b": 2, "c": 1}
    assert plan_ranks(equal, layers, budget=6) == {"a": 2, "b": 2, "c": 2}
    assert plan_ranks(equal, layers, budget=7) == {"a": 3, "b": 2, "c": 2}


def test_a_held_rank_moves_only_for_a_gain_above_the_hysteresis():
    # a's 3rd rank is worth w_a / 2.5, b's 2nd w_b / 1.5: b gains by w_b * 2.5 / (w_a * 1.5).
    layers = {"a": layer(held=3), "b": layer(held=1)}
    worth_20_percent_more = {"a": 1.0, "b": 0.72}
    assert plan_ranks(worth_20_percent_more, layers, budget=4) == {"a": 2, "b": 2}
    stays = plan_ranks(worth_20_percent_more, layers, budget=4, hysteresis=0.25)
    assert stays == {"a": 3, "b": 1}
    worth_30_percent_more = {"a": 1.0, "b": 0.78}
    moves = plan_ranks(worth_30_percent_more, layers, budget=4, hysteresis=0.25)
    assert moves == {"a": 2, "b": 2}


def test_a_rank_too_dear_for_what_is_left_is_passed_over_for_a_cheaper_one():
    layers = {"dear": layer(cost=10), "cheap": layer(cost=3)}
    ranks = plan_ranks({"dear": 0.99, "cheap": 0.01}, layers, budget=13 + 9)
    assert ranks == {"dear": 1, "cheap": 4}


def test_a_budget_of_exactly_the_floors_gives_the_floors():
    layers = {"a": layer(cost=5, floor=2), "b": layer(cost=7, floor=3)}
    assert plan_ranks({"a": 0.5, "b": 0.5}, layers, budget=31) == {"a": 2, "b": 3}


def test_a_budget_above_all_ceilings_gives_the_ceilings():
    layers = {"a": layer(ceiling=4), "b": layer(ceiling=3)}
    assert plan_ranks({"a": 0.5, "b": 0.5}, layers, budget=1000) == {"a": 4, "b": 3}


def test_a_budget_below_the_floors_is_refused_with_the_range_that_can_be_spent():
    layers = {"a": layer(cost=5, floor=2, ceiling=8), "b": layer(cost=7, floor=3, ceiling=8)}
    message = re.escape(
        "A budget of 30 parameters cannot hold 2 layers at their lowest ranks, which take 31: "
        "lower `min_rank`, or use a budget in [31, 96]."
    )
    with pytest.raises(BudgetError, match=message):
        check_budget(layers, 30)
    with pytest.raises(BudgetError, match=message):
        plan_ranks({"a": 0.5, "b": 0.5}, layers, budget=30)


def bounds_of(**given):
    usual = {"cost": 9, "held": 4, "widest": 16, "min_rank": 1, "max_rank": 1000}
    return bound_layer(**(usual | given))


@pytest.mark.parametrize(
    ("given", "floor", "ceiling"),
    [
        ({}, 1, 16),
        ({"min_rank": 3}, 3, 16),
        ({"max_rank": 6}, 1, 6),
        ({"min_rank": 20}, 4, 16),  # a layer that holds less than the lowest rank may keep that
        ({"min_rank": 20, "held": 20}, 20, 20),
        ({"held": 20}, 1, 20),  # held above a full update: allowed to stay
        ({"kept_by_tolerance": 3}, 3, 16),
        ({"kept_by_tolerance": 9, "max_rank": 6}, 6, 6),
        ({"limit": 7.6}, 1, 8),
        ({"limit": 2.0}, 1, 4),  # a limit never forces a shrink
        ({"limit": 30.0}, 1, 16),
        ({"limit": 2.0, "min_rank": 6, "held": 7}, 6, 7),
        ({"pinned": True}, 4, 4),
        ({"pinned": True, "min_rank": 6, "max_rank": 9, "kept_by_tolerance": 5}, 4, 4),
    ],
)
def test_a_layer_is_bounded_by(given, floor, ceiling):
    held = given.get("held", 4)
    assert bounds_of(**given) == LayerBounds(cost=9, floor=floor, ceiling=ceiling, held=held)


def test_a_layer_of_fewer_directions_than_the_average_is_limited_by_the_square_of_their_ratio():
    limits = limit_by_directions({"few": 1.0, "average": 4.0, "many": 7.0}, at_mean=64)
    assert limits == {"few": 4.0, "average": 64.0, "many": 196.0}
    assert limit_by_directions({}, at_mean=64) == {}
