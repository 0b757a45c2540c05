"""Invariant 10: scores that say nothing give the uniform plan, which is plain LoRA's."""

import pytest

from dynlora.adjuster import LayerBounds, plan_ranks
from dynlora.allocator import allocate_shares
from tests.models import adamw, attached, lora_llama, train

COSTS = {"a": 64, "b": 96, "c": 640, "d": 97}


@pytest.mark.parametrize("scores", [{}, dict.fromkeys(COSTS, 0.0), dict.fromkeys(COSTS, 3.7)])
@pytest.mark.parametrize("held", [2, 8, 20])
def test_missing_zero_and_equal_scores_give_the_uniform_plan_from_any_ranks(scores, held):
    gains = {"a": 0.3, "d": 2.0}  # what the features say does not count either
    shares = allocate_shares(scores, COSTS, gains=gains, temperature=0.5, uniform_mix=0.0)
    bounds = {
        name: LayerBounds(cost=cost, floor=1, ceiling=60, held=held) for name, cost in COSTS.items()
    }
    ranks = plan_ranks(shares, bounds, budget=8 * sum(COSTS.values()), hysteresis=0.0)
    assert ranks == dict.fromkeys(COSTS, 8)


def test_feature_ceilings_do_not_bind_where_scores_say_nothing():
    model = lora_llama(r=12)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, importance="uniform", total_steps=30)
    train(model, optimizer, dynamic, 30)
    effective = [x.effective_rank for e in dynamic.history for x in e.layers.values()]
    assert min(effective) < 12  # they would have bound
    assert set(dynamic.ranks.values()) == {12}


@pytest.mark.parametrize(
    "importance", ["signal", "activation_ratio", "gradient_norm", "fisher", "magnitude"]
)
def test_default_settings_move_ranks_where_scores_differ(importance):
    model = lora_llama(r=8)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, importance=importance, total_steps=60)
    train(model, optimizer, dynamic, 60)
    assert len(set(dynamic.ranks.values())) > 1
