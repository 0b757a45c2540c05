"""Invariant 10: scores that say nothing leave every rank as it is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from dynlora import schedule
from dynlora.adjuster import LayerBounds, plan_ranks
from dynlora.allocator import allocate_shares
from dynlora.history import moved
from tests.models import adamw, attached, lora_llama, trained

COSTS = {"a": 64, "b": 96, "c": 640, "d": 97}


@pytest.mark.parametrize("scores", [{}, dict.fromkeys(COSTS, 0.0), dict.fromkeys(COSTS, 3.7)])
@pytest.mark.parametrize("ranks", [(8, 8, 8, 8), (2, 19, 1, 7), (60, 1, 3, 2)])
@pytest.mark.parametrize("hysteresis", [0.0, 0.25])
def test_missing_zero_and_equal_scores_move_nothing_from_any_ranks(scores, ranks, hysteresis):
    held = dict(zip(COSTS, ranks, strict=True))
    gains = {"a": 0.3, "d": 2.0}  # what the features say does not count either
    shares = allocate_shares(
        scores, COSTS, held=held, gains=gains, temperature=0.5, uniform_mix=0.2
    )
    bounds = {
        name: LayerBounds(cost=cost, floor=1, ceiling=60, held=held[name])
        for name, cost in COSTS.items()
    }
    live = sum(COSTS[name] * rank for name, rank in held.items())
    for unspent in (0, min(COSTS.values()) - 1):
        planned = plan_ranks(shares, bounds, budget=live + unspent, hysteresis=hysteresis)
        assert planned == held


def test_feature_ceilings_do_not_bind_where_scores_say_nothing():
    model = lora_llama(r=12)
    _, dynamic = trained(model, 30, importance="uniform", total_steps=30)
    effective = [x.effective_rank for e in dynamic.history for x in e.layers.values()]
    assert min(effective) < 12  # they would have bound
    assert set(dynamic.ranks.values()) == {12}


@pytest.mark.parametrize("importance", ["signal", "activation_ratio"])
def test_default_settings_move_ranks_where_scores_differ(importance):
    model = lora_llama(r=8)
    _, dynamic = trained(model, 60, importance=importance, total_steps=60)
    assert len(set(dynamic.ranks.values())) > 1


def moves_a_rank_on_random_labels(seed):
    """Train a small classifier for three epochs, and return whether any rank moved."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(512, 16, generator=generator)
    labels = torch.randint(3, (512,), generator=generator)
    torch.manual_seed(seed)
    layers = [nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)]
    config = LoraConfig(r=4, target_modules=["0", "2", "4"])
    model = get_peft_model(nn.Sequential(*layers), config)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=96, first_event=0.05, last_event=0.3)
    for _ in range(3):
        for rows in torch.randperm(512, generator=generator).split(16):
            cross_entropy(model(inputs[rows]), labels[rows]).backward()
            dynamic.observe()
            optimizer.step()
            dynamic.step()
            optimizer.zero_grad()
    return any(map(moved, dynamic.history))


@pytest.mark.slow
@pytest.mark.parametrize("apart", [1, 2, 4])
def test_random_labels_move_ranks_in_at_most_a_twentieth_of_runs(apart, monkeypatch):
    monkeypatch.setattr(schedule, "_blocks_apart", lambda events, step: apart)
    assert sum(map(moves_a_rank_on_random_labels, range(200))) <= 10
