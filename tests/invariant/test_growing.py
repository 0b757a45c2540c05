"""Invariant 3: growing changes nothing that the model computes, and leaves room to learn."""

import torch

from dynlora import RankPlan
from tests.models import adamw, attached, sequences, train


def grown(model, optimizer):
    """Train, make room by halving every layer, train on, then return the controller."""
    dynamic = attached(model, optimizer, importance="uniform", total_steps=1000)
    train(model, optimizer, dynamic, 20)
    dynamic.apply(RankPlan(step=20, ranks=dict.fromkeys(dynamic.ranks, 2)))
    train(model, optimizer, dynamic, 5)
    return dynamic


@torch.no_grad()
def logits(model):
    return model(input_ids=next(sequences(batch=16, seed=9))).logits


def test_growing_preserves_logits_to_1e_6(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = grown(tiny_llama, optimizer)
    before = logits(tiny_llama)
    dynamic.apply(RankPlan(step=25, ranks=dict.fromkeys(dynamic.ranks, 4)))
    assert (logits(tiny_llama) - before).abs().max() <= 1e-6


def test_grown_columns_of_lora_B_are_zero_and_grown_rows_of_lora_A_are_not(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = grown(tiny_llama, optimizer)
    old = {layer.name: layer.lora_A.detach().clone() for layer in dynamic._layers}
    dynamic.apply(RankPlan(step=25, ranks=dict.fromkeys(dynamic.ranks, 4)))
    for layer in dynamic._layers:
        assert torch.equal(layer.lora_A[:2], old[layer.name])
        assert not layer.lora_B[:, 2:].any()
        assert layer.lora_A[2:].any(dim=1).all()


def test_grown_rows_see_as_much_input_as_the_rows_held(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = grown(tiny_llama, optimizer)
    tokens = {name: stats.tokens for name, stats in dynamic._analyzer.stats().items()}
    dynamic.apply(RankPlan(step=25, ranks=dict.fromkeys(dynamic.ranks, 4)))
    for layer in dynamic._layers:
        power = (tokens[layer.name] @ layer.lora_A.T).square().mean(dim=0)
        torch.testing.assert_close(power[2:], power[:2].mean().expand(2), rtol=1e-3, atol=0)


def test_grown_directions_learn(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = grown(tiny_llama, optimizer)
    dynamic.apply(RankPlan(step=25, ranks=dict.fromkeys(dynamic.ranks, 4)))
    train(tiny_llama, optimizer, dynamic, 3)
    for layer in dynamic._layers:
        assert layer.lora_B[:, 2:].any(dim=0).all()
