"""Whole ranks from shares, limits and minimum ranks, against numbers worked out by hand."""

import re
from dataclasses import dataclass

import pytest

from dynlora import DynamicLoraConfig
from dynlora.adjuster import (
    LayerBounds,
    adjust,
    bound_layers,
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


def test_a_budget_below_the_floors_is_refused_with_its_range():
    layers = {"a": layer(cost=5, floor=2, ceiling=8), "b": layer(cost=7, floor=3, ceiling=8)}
    message = re.escape("budget of 30 parameters") + ".*take 31.*" + re.escape("in [31, 96]")
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


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        ({"most": 0.3, "small": 0.9}, [0.3, 0.3, 0.4]),  # 0.4, spread by cost over the others
        ({}, [0.7, 0.2, 0.1]),
        ({"most": 0.7, "large": 0.5}, [0.7, 0.2, 0.1]),
        ({"most": 0.5, "small": 0.1, "large": 0.0}, [0.7, 0.2, 0.1]),  # every layer has excess
    ],
)
def test_excess_over_usable_shares_goes_to_the_layers_that_have_none(usable, expected):
    costs = {"most": 10, "small": 10, "large": 30}
    shares = {"most": 0.7, "small": 0.2, "large": 0.1}
    found = spread_excess(shares, usable, costs)
    assert list(found.values()) == pytest.approx(expected)


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
    return adjusted(*given, **named)[0]


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


@pytest.mark.parametrize(
    ("directions", "limits", "rank"),
    [
        (few(5.0, 8.0), {}, 13),
        (few(5.0, 8.0), {"max_rank": 8}, 8),  # a lower `max_rank` tightens no other limit
        (few(4.0, 9.0), {}, 9),  # 32 (4 / 7.75)² is 8.5
        (few(4.0, 9.0), {"max_rank": 64}, 13),  # a higher one loosens it
        ({}, {"inputs": {"most": 6.0}}, 6),
    ],
)
def test_directions_and_inputs_limit_growth(directions, limits, rank):
    assert ranks_of(SCORES, directions, **limits)["most"] == rank
    assert ranks_of(SCORES, few(3.0, 8.0), max_rank=8)["most"] < 8


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
    given = {"unreached": {"fourth"}, "minima": {"fourth": 3}}
    kept, waits = adjusted([2.0, 1.0, 1.0, 1.0], {}, **given)
    assert kept["fourth"] == 3
    assert "fourth" in waits
    pinned = ranks_of([2.0, 1.0, 1.0, 1.0], {}, unreached={"fourth"}, pinned=("fourth",))
    assert pinned["fourth"] == 4
    assert ranks_of([1.0] * 4, {}, unreached={"fourth"}) == dict.fromkeys(NAMES, 4)


def test_only_layers_that_would_shrink_below_their_minimum_wait():
    without, none = adjusted(SCORES, {})
    within, waits = adjusted(SCORES, {}, minima={"third": 3})
    assert without["third"] < 3 == within["third"]
    assert (none, waits) == (set(), {"third"})
