"""`uniform`: every layer the same, whatever training shows."""

import torch

from dynlora.importance.uniform import UniformMetric
from dynlora.types import BasisChange
from tests.lora_layers import layers_of, lora_chain, set_gradients


def test_every_layer_scores_one():
    layers = layers_of(lora_chain(8, 6, 4))
    metric = UniformMetric()
    set_gradients(layers, seed=0)
    metric.observe(layers)
    metric.rebase(BasisChange(name="0", to_A=torch.eye(2, 4), to_B=torch.eye(4, 2)))
    assert metric.scores(layers, {}) == {"0": 1.0, "1": 1.0}


def test_it_keeps_no_state():
    metric = UniformMetric()
    metric.load_state_dict(metric.state_dict())
    assert metric.state_dict() == {}
