"""Invariant 3: what growing keeps and adds; `test_models` checks outputs and learning."""

import torch

from dynlora import RankPlan
from tests.models import train, trained


def test_growing_keeps_the_rows_held_and_adds_rows_that_see_as_much_input(tiny_llama):
    optimizer, dynamic = trained(tiny_llama, 20, importance="uniform", total_steps=1000)
    dynamic.apply(RankPlan(step=20, ranks=dict.fromkeys(dynamic.ranks, 2)))
    train(tiny_llama, optimizer, dynamic, 5)
    old = {layer.name: layer.lora_A.detach().clone() for layer in dynamic._layers}
    tokens = {name: stats.tokens for name, stats in dynamic._analyzer.stats().items()}
    dynamic.apply(RankPlan(step=25, ranks=dict.fromkeys(dynamic.ranks, 4)))
    for layer in dynamic._layers:
        assert torch.equal(layer.lora_A[:2], old[layer.name])
        power = (tokens[layer.name] @ layer.lora_A.T).square().mean(dim=0)
        torch.testing.assert_close(power[2:], power[:2].mean().expand(2), rtol=1e-3, atol=0)
