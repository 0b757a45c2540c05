"""Invariants 7 and 9: same seed, same machine, same ranks and weights, at any logging level."""

import pytest
import torch

from dynlora.config import METRICS
from tests.models import lora_llama, trained


@pytest.mark.parametrize("importance", METRICS)
def test_same_seed_twice_is_bitwise_equal_whatever_is_logged(importance, caplog):
    runs = []
    for level in ("DEBUG", "CRITICAL"):
        caplog.set_level(level, logger="dynlora")
        model = lora_llama()
        _, dynamic = trained(model, 30, importance=importance, total_steps=30, hysteresis=0)
        runs.append((dynamic.history, [p.detach() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    layers = [layer for event in runs[0][0] for layer in event.layers.values()]
    moved = any(layer.rank_before != layer.rank_after for layer in layers)
    assert moved == (importance != "uniform")
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1], runs[1][1], strict=True))


def test_the_random_metric_follows_its_seed():
    ranks = []
    for seed in (0, 1):
        model = lora_llama()
        _, dynamic = trained(model, 30, importance="random", total_steps=30, seed=seed)
        ranks.append(dynamic.ranks)
    assert ranks[0] != ranks[1]
