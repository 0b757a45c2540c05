"""Whole ranks from shares, limits and minimum ranks, against numbers worked out by hand."""

import re
from dataclasses import dataclass

import pytest

from dynlora import DynamicLoraConfig
from dynlora.adjuster import (
    LayerBounds,
    adjust,
    bound_layers,
    check_budget,
    limit_by_directions,
    plan_ranks,
    spread_excess,
)
from dynlora.allocator import allocate
from dynlora.errors import BudgetError
from dynlora.types import Assessment

NAMES = ["most", "second", "third", "fourth"]
SCORES = [8.0, 2.0, 1.0, 1.0]


@dataclass(frozen=True)
class Shape:
    name: str
    r: int = 4
    cost: int = 10
    widest: int = 100
    is_trained: bool = True


def layer(cost=1, floor=1, ceiling=100, held=1):
    return LayerBounds(cost=cost, floor=floor, ceiling=ceiling, held=held)


def test_remainders_follow_the_webster_divisor_rule():
    # Quotients w / (k - 1/2): a 10.6 3.53 2.12 1.51, b 6.6 2.2 1.32, c 2.8 0.93; the 7 largest.
    layers = {name: layer() for name in "abc"}
    ranks = plan_ranks({"a": 5.3, "b": 3.3, "c": 1.4}, layers, budget=7)
    assert ranks == {"a": 4, "b": 2, "c": 1}


@pytest.mark.parametrize(("share", "rank"), [(1.64, 2), (1.69, 3)])
def test_a_third_rank_needs_five_thirds_of_the_share_of_a_second(share, rank):
    layers = {"a": layer(), "b": layer()}
    assert plan_ranks({"a": 1.0, "b": share}, layers, budget=4) == {"a": 4 - rank, "b": rank}


def test_equal_shares_per_parameter_give_equal_ranks_at_any_cost():
    layers = {"small": layer(cost=10), "large": layer(cost=70)}
    ranks = plan_ranks({"small": 1 / 8, "large": 7 / 8}, layers, budget=80 * 5)
    assert ranks == {"small": 5, "large": 5}


def test_ties_go_to_the_smaller_rank_then_to_the_name():
    layers = {"b": layer(floor=2), "a": layer(floor=1), "c": layer(floor=1)}
    equal = {"a": 0.0, "b": 0.0, "c": 0.0}
    assert plan_ranks(equal, layers, budget=5) == {"a": 2, "b": 2, "c": 1}
    assert plan_ranks(equal, layers, budget=7) == {"a": 3, "b": 2, "c": 2}


def test_an_existing_rank_moves_only_for_a_gain_above_the_hysteresis():
    # a's 3rd rank is worth w_a / 2.5, b's 2nd w_b / 1.5: b gains by w_b * 2.5 / (w_a * 1.5).
    layers = {"a": layer(held=3), "b": layer(held=1)}
    worth_20_percent_more = {"a": 1.0, "b": 0.72}
    assert plan_ranks(worth_20_percent_more, layers, budget=4) == {"a": 2, "b": 2}
    stays = plan_ranks(worth_20_percent_more, layers, budget=4, hysteresis=0.25)
    assert stays == {"a": 3, "b": 1}
    moves = plan_ranks({"a": 1.0, "b": 0.78}, layers, budget=4, hysteresis=0.25)
    assert moves == {"a": 2, "b": 2}


def test_a_rank_that_no_longer_fits_is_passed_over_for_a_cheaper_one():
    layers = {"dear": layer(cost=10), "cheap": layer(cost=3)}
    ranks = plan_ranks({"dear": 0.99, "cheap": 0.01}, layers, budget=13 + 9)
    assert ranks == {"dear": 1, "cheap": 4}


def test_a_budget_above_all_ceilings_gives_the_ceilings():
    layers = {"a": layer(ceiling=4), "b": layer(ceiling=3)}
    assert plan_ranks({"a": 0.5, "b": 0.5}, layers, budget=1000) == {"a": 4, "b": 3}


def test_a_budget_below_the_floors_is_refused_with_its_range():
    layers = {"a": layer(cost=5, floor=2, ceiling=8), "b": layer(cost=7, floor=3, ceiling=8)}
    message = re.escape("budget of 30 parameters") + ".*take 31.*" + re.escape("in [31, 96]")
    with pytest.raises(BudgetError, match=message):
        check_budget(layers, 30)
    with pytest.raises(BudgetError, match=message):
        plan_ranks({"a": 0.5, "b": 0.5}, layers, budget=30)


@pytest.mark.parametrize(
    ("given", "floor", "ceiling"),
    [
        ({}, 1, 16),
        ({"min_rank": 3}, 3, 16),
        ({"max_rank": 6}, 1, 6),
        ({"min_rank": 20}, 4, 16),  # a layer whose live rank is lower may keep it
        ({"min_rank": 20, "r": 20}, 20, 20),
        ({"r": 20}, 1, 20),  # live rank above a full update: may stay
        ({"minimum": 3}, 3, 16),
        ({"minimum": 9, "max_rank": 6}, 6, 6),
        ({"limit": 7.6}, 1, 8),
        ({"limit": 2.0}, 1, 4),  # a limit never forces a shrink
        ({"limit": 30.0}, 1, 16),
        ({"limit": 2.0, "min_rank": 6, "r": 7}, 6, 7),
        ({"lowered": True}, 1, 1),
        ({"lowered": True, "minimum": 3}, 3, 3),
        ({"pinned": True}, 4, 4),
        ({"pinned": True, "lowered": True, "min_rank": 6, "max_rank": 9, "minimum": 5}, 4, 4),
    ],
)
def test_a_layer_is_bounded_by(given, floor, ceiling):
    config = DynamicLoraConfig(
        min_rank=given.get("min_rank", 1), pinned=("only",) if "pinned" in given else ()
    )
    held = given.get("r", 4)
    bounds = bound_layers(
        [Shape("only", r=held, cost=9, widest=16)],
        config,
        max_rank=given.get("max_rank", 1000),
        minima={"only": given.get("minimum", 1)},
        limits={"only": given["limit"]} if "limit" in given else {},
        lowered={"only"} if "lowered" in given else set(),
    )
    assert bounds == {"only": LayerBounds(cost=9, floor=floor, ceiling=ceiling, held=held)}


def test_layers_of_fewer_directions_are_limited_by_the_square_of_the_ratio_to_the_mean():
    limits = limit_by_directions({"few": 1.0, "average": 4.0, "many": 7.0}, at_mean=64)
    assert limits == {"few": 4.0, "average": 64.0, "many": 196.0}
    assert limit_by_directions({}, at_mean=64) == {}


def test_excess_over_the_usable_share_is_spread_by_cost():
    costs = {"most": 10, "small": 10, "large": 30}
    shares = {"most": 0.7, "small": 0.2, "large": 0.1}
    spread = spread_excess(shares, {"most": 0.3, "small": 0.9}, costs)
    assert spread == pytest.approx({"most": 0.3, "small": 0.3, "large": 0.4})


def test_shares_stay_if_no_layer_or_every_layer_has_excess():
    costs, shares = {"a": 1, "b": 1}, {"a": 0.75, "b": 0.25}
    assert spread_excess(shares, {}, costs) == shares
    assert spread_excess(shares, {"a": 0.75, "b": 0.5}, costs) == shares
    assert spread_excess(shares, {"a": 0.5, "b": 0.1}, costs) == shares


def adjusted(
    scores,
    directions,
    *,
    held=(4, 4, 4, 4),
    max_rank=32,
    inputs=None,
    budget=None,
    unreached=frozenset(),
    minima=None,
    pinned=(),
    costs=(10, 10, 10, 10),
):
    layers = [Shape(*given) for given in zip(NAMES, held, costs, strict=True)]
    config = DynamicLoraConfig(total_steps=100, uniform_mix=0.0, hysteresis=0.0, pinned=pinned)
    scored = {n: s for n, s in zip(NAMES, scores, strict=True) if n not in unreached}
    assessed = Assessment(scores=scored, directions=directions, unreached=unreached)
    shares = allocate(assessed, layers, {}, config)
    assert sum(shares.values()) == pytest.approx(1)
    return adjust(
        shares,
        layers,
        assessed,
        inputs or {},
        config,
        budget=budget or sum(layer.cost * layer.r for layer in layers),
        max_rank=max_rank,
        minima=minima or {},
    )


def ranks_of(*given, **named):
    return adjusted(*given, **named).ranks


def few(most, others=7.0):
    return {"most": most, "second": others, "third": others, "fourth": others}


def test_scores_alone_decide_if_all_layers_have_as_many_directions():
    even = ranks_of(SCORES, dict.fromkeys(NAMES, 5.0))
    assert even == ranks_of(SCORES, {})
    assert even["most"] == 13


def test_a_layer_of_one_direction_keeps_its_rank_and_its_excess_is_spread():
    assert ranks_of(SCORES, few(1.0)) == dict.fromkeys(NAMES, 4)


def test_directions_decide_nothing_without_informative_scores():
    assert list(ranks_of([3.0] * 4, few(1.0), held=(1, 5, 7, 3)).values()) == [1, 5, 7, 3]


@pytest.mark.parametrize(
    ("budget", "ranks"),
    [
        (169, [1, 5, 7, 3]),  # less than one rank is left
        (320, [2, 10, 14, 6]),
        (220, [1, 7, 10, 4]),  # 1.4, 6.9, 9.6 and 4.1
    ],
)
def test_without_informative_scores_unspent_budget_follows_the_ranks(budget, ranks):
    held = (1, 5, 7, 3)
    assert list(ranks_of([3.0] * 4, {}, held=held, budget=budget).values()) == ranks


def test_a_lower_max_rank_does_not_tighten_the_limit_by_directions():
    assert ranks_of(SCORES, few(5.0, 8.0))["most"] == 13
    assert ranks_of(SCORES, few(5.0, 8.0), max_rank=8)["most"] == 8
    assert ranks_of(SCORES, few(3.0, 8.0), max_rank=8)["most"] < 8


def test_a_higher_max_rank_loosens_the_limit_by_directions():
    assert ranks_of(SCORES, few(4.0, 9.0), max_rank=32)["most"] == 9  # 32 (4 / 7.75)² is 8.5
    assert ranks_of(SCORES, few(4.0, 9.0), max_rank=64)["most"] == 13


def test_an_input_limits_growth():
    assert ranks_of(SCORES, {}, inputs={"most": 6.0})["most"] == 6


def test_a_layer_without_gradients_gets_the_lowest_rank_and_no_excess():
    unreached = {"fourth"}
    ranks = ranks_of([2.0, 1.0, 1.0, 9.0], {}, unreached=unreached, held=(5, 4, 4, 4))
    assert ranks == {"most": 10, "second": 3, "third": 3, "fourth": 1}
    directions = {"most": 1.0, "second": 4.0, "third": 4.0}
    given = {"unreached": unreached, "costs": (30, 30, 30, 10), "budget": 410}
    ranks = ranks_of([8.0, 1.0, 1.0, 1.0], directions, **given)
    assert (ranks["most"], ranks["fourth"]) == (4, 1)
    assert ranks["second"] + ranks["third"] == 9  # another rank of 10 would fit


def test_a_layer_without_gradients_keeps_its_minimum_or_its_pinned_rank():
    kept = adjusted([2.0, 1.0, 1.0, 1.0], {}, unreached={"fourth"}, minima={"fourth": 3})
    assert kept.ranks["fourth"] == 3
    assert "fourth" in kept.waits
    assert (
        ranks_of([2.0, 1.0, 1.0, 1.0], {}, unreached={"fourth"}, pinned=("fourth",))["fourth"] == 4
    )
    assert ranks_of([1.0] * 4, {}, unreached={"fourth"}) == dict.fromkeys(NAMES, 4)


def test_only_layers_that_would_shrink_below_their_minimum_wait():
    without, within = adjusted(SCORES, {}), adjusted(SCORES, {}, minima={"third": 3})
    assert without.ranks["third"] < 3 == within.ranks["third"]
    assert (without.waits, within.waits) == (set(), {"third"})
