"""Invariant 1: live LoRA parameters never exceed the budget, the peak included."""

import pytest
from torch import nn

from dynlora import RankPlan
from dynlora.adapters import resize
from dynlora.errors import BudgetError
from tests.models import adamw, attached, train


def count_lora(model: nn.Module) -> int:
    """Count from the tensors themselves, independently of what the layers say."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_tensors_never_hold_more_than_the_budget_at_any_moment(tiny_llama, monkeypatch):
    optimizer = adamw(tiny_llama)
    dynamic = attached(tiny_llama, optimizer, total_steps=40, hysteresis=0)
    budget = count_lora(tiny_llama)
    assert dynamic.budget == budget
    peak = 0

    original = resize.set_data

    def counted(parameter, data):
        nonlocal peak
        original(parameter, data)
        peak = max(peak, count_lora(tiny_llama))

    monkeypatch.setattr(resize, "set_data", counted)
    train(tiny_llama, optimizer, dynamic, 40)
    moved = [e for e in dynamic.history for x in e.layers.values() if x.rank_before != x.rank_after]
    assert moved
    assert peak <= budget
    assert dynamic.peak_parameters <= budget


def test_less_than_one_rank_of_the_cheapest_growable_layer_stays_unspent(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = attached(
        tiny_llama, optimizer, total_steps=40, hysteresis=0, shrink_tolerance=1.0, max_rank=7
    )
    train(tiny_llama, optimizer, dynamic, 40)
    costs = {layer.name: layer.cost for layer in dynamic._layers}
    growable = [costs[name] for name, rank in dynamic.ranks.items() if rank < 7]
    assert dynamic.budget - count_lora(tiny_llama) < min(growable)


def test_a_plan_of_ones_own_above_the_budget_is_refused(tiny_llama):
    dynamic = attached(tiny_llama, adamw(tiny_llama), total_steps=40)
    name = next(iter(dynamic.ranks))
    with pytest.raises(BudgetError, match=f"at most the budget of {dynamic.budget}"):
        dynamic.apply(RankPlan(step=0, ranks={name: 5}))
