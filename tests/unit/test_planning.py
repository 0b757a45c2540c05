"""An event's plan from scores, directions and inputs, by hand."""

from dataclasses import dataclass

import pytest
import torch

from dynlora import DynamicLoraConfig
from dynlora.planning import plan_event
from dynlora.types import Assessment, FeatureStats

NAMES = ["most", "second", "third", "fourth"]


@dataclass(frozen=True)
class Shape:
    name: str
    r: int = 4
    cost: int = 10
    widest: int = 100
    is_trained: bool = True


def plan_of(
    scores,
    directions,
    *,
    held=(4, 4, 4, 4),
    max_rank=32,
    features=None,
    budget=None,
    unreached=frozenset(),
    lowest=1,
    pinned=(),
    costs=(10, 10, 10, 10),
):
    layers = [Shape(*given) for given in zip(NAMES, held, costs, strict=True)]
    config = DynamicLoraConfig(total_steps=100, uniform_mix=0.0, hysteresis=0.0, pinned=pinned)
    scored = {n: s for n, s in zip(NAMES, scores, strict=True) if n not in unreached}
    return plan_event(
        layers,
        Assessment(scores=scored, directions=directions, unreached=unreached),
        features or {},
        config,
        budget=budget or sum(layer.cost * layer.r for layer in layers),
        max_rank=max_rank,
        measure_lowest=lambda names: dict.fromkeys(names, lowest),
        agree=lambda ranks: ranks,
    )


def ranks_of(*given, **named):
    return plan_of(*given, **named).ranks


def test_where_all_gradients_have_as_many_directions_scores_alone_decide():
    scores = [8.0, 2.0, 1.0, 1.0]
    even = ranks_of(scores, dict.fromkeys(NAMES, 5.0))
    assert even == ranks_of(scores, {})
    assert even["most"] == 13


def test_a_layer_of_one_direction_keeps_its_rank_and_what_it_asked_for_is_spread_evenly():
    few = {"most": 1.0, "second": 7.0, "third": 7.0, "fourth": 7.0}
    ranks = ranks_of([8.0, 2.0, 1.0, 1.0], few)
    assert ranks == dict.fromkeys(NAMES, 4)


def test_directions_decide_nothing_where_scores_say_nothing():
    few = {"most": 1.0, "second": 7.0, "third": 7.0, "fourth": 7.0}
    held = (1, 5, 7, 3)
    assert list(ranks_of([3.0] * 4, few, held=held).values()) == [1, 5, 7, 3]


@pytest.mark.parametrize(
    ("budget", "ranks"),
    [
        (169, [1, 5, 7, 3]),  # less than one rank is left
        (320, [2, 10, 14, 6]),
        (220, [1, 7, 10, 4]),  # 1.4, 6.9, 9.6 and 4.1
    ],
)
def test_unspent_budget_goes_to_layers_as_their_ranks_where_scores_say_nothing(budget, ranks):
    held = (1, 5, 7, 3)
    assert list(ranks_of([3.0] * 4, {}, held=held, budget=budget).values()) == ranks


def test_a_lower_max_rank_does_not_hold_layers_of_few_directions_lower_yet():
    fewer = {"most": 5.0, "second": 8.0, "third": 8.0, "fourth": 8.0}
    scores = [8.0, 2.0, 1.0, 1.0]
    assert ranks_of(scores, fewer)["most"] == 13
    assert ranks_of(scores, fewer, max_rank=8)["most"] == 8
    assert ranks_of(scores, fewer | {"most": 3.0}, max_rank=8)["most"] < 8


@pytest.mark.parametrize(("dimensions", "limited"), [(6.0, True), (9.0, False)])
def test_an_input_limits_a_layer_where_the_sample_has_room_for_twice_its_dimensions(
    dimensions, limited
):
    tokens = torch.zeros(16, 100)
    stats = FeatureStats(tokens=tokens, variance=1.0, effective_rank=dimensions, output_power=1.0)
    ranks = ranks_of([8.0, 2.0, 1.0, 1.0], {}, features=dict.fromkeys(NAMES, stats))
    assert ranks["most"] == (6 if limited else 13)


def test_ranks_move_though_a_sample_has_fewer_tokens_than_they_are():
    stats = FeatureStats(
        tokens=torch.zeros(64, 500), variance=1.0, effective_rank=60.0, output_power=1.0
    )
    features = dict.fromkeys(NAMES, stats)
    ranks = ranks_of([8.0, 2.0, 1.0, 1.0], {}, held=[80] * 4, max_rank=640, features=features)
    assert ranks["most"] > 80


def test_a_higher_max_rank_lets_layers_of_few_directions_grow_further():
    fewer = {"most": 4.0, "second": 9.0, "third": 9.0, "fourth": 9.0}
    scores = [8.0, 2.0, 1.0, 1.0]
    assert ranks_of(scores, fewer, max_rank=32)["most"] == 9  # 32 (4 / 7.75)² is 8.5
    assert ranks_of(scores, fewer, max_rank=64)["most"] == 13


def test_a_layer_without_gradients_gets_the_lowest_rank_and_the_others_share_the_rest():
    plan = plan_of([2.0, 1.0, 1.0, 9.0], {}, unreached={"fourth"}, held=(5, 4, 4, 4))
    assert plan.ranks == {"most": 10, "second": 3, "third": 3, "fourth": 1}
    assert plan.shares["fourth"] == 0
    assert sum(plan.shares.values()) == pytest.approx(1)


def test_a_layer_without_gradients_gets_neither_leftovers_nor_what_others_have_no_use_for():
    few = {"most": 1.0, "second": 4.0, "third": 4.0}
    given = {"unreached": {"fourth"}, "costs": (30, 30, 30, 10), "budget": 410}
    ranks = ranks_of([8.0, 1.0, 1.0, 1.0], few, **given)
    assert ranks["fourth"] == 1
    assert ranks["most"] == 4
    assert ranks["second"] + ranks["third"] == 9  # another rank of 10 would fit


def test_a_layer_without_gradients_keeps_what_it_must_and_a_pinned_one_all():
    kept = plan_of([2.0, 1.0, 1.0, 1.0], {}, unreached={"fourth"}, lowest=3)
    assert kept.ranks["fourth"] == 3
    assert "fourth" in kept.waits
    pinned = plan_of([2.0, 1.0, 1.0, 1.0], {}, unreached={"fourth"}, pinned=("fourth",))
    assert pinned.ranks["fourth"] == 4


def test_a_layer_without_gradients_keeps_its_rank_where_scores_say_nothing():
    assert ranks_of([1.0] * 4, {}, unreached={"fourth"}) == dict.fromkeys(NAMES, 4)
