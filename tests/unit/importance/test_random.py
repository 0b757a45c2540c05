"""`random`: reproducible, new at each event, and without torch's global random state."""

import pytest
import torch

from dynlora.importance.random import RandomMetric
from tests.lora_layers import layers_of, lora_chain

LAYERS = layers_of(lora_chain(*[4] * 41, r=1))


def test_scores_depend_on_the_seed_alone():
    one, same, other = RandomMetric(3), RandomMetric(3), RandomMetric(4)
    first = one.scores(LAYERS, {})
    assert first == same.scores(LAYERS[::-1], {})
    assert first != other.scores(LAYERS, {})


def test_scores_are_drawn_anew_at_each_event():
    metric = RandomMetric(0)
    first, second = metric.scores(LAYERS, {}), metric.scores(LAYERS, {})
    assert all(first[layer.name] != second[layer.name] for layer in LAYERS)


def test_scores_fill_the_unit_interval():
    metric = RandomMetric(0)
    drawn = [score for _ in range(25) for score in metric.scores(LAYERS, {}).values()]
    assert len(drawn) == len(set(drawn)) == 1000
    assert min(drawn) > 0
    assert max(drawn) <= 1
    assert sum(drawn) / 1000 == pytest.approx(0.5, abs=0.05)
    assert sum(score < 0.1 for score in drawn) == pytest.approx(100, abs=40)


def test_the_global_random_state_is_neither_read_nor_moved():
    metric = RandomMetric(0)
    before = torch.get_rng_state()
    first = metric.scores(LAYERS, {})
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert RandomMetric(0).scores(LAYERS, {}) == first
