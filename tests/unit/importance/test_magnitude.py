"""`magnitude`: the norm of what the adapter adds to the weight, by the full matrix."""

import math

import pytest
import torch

from dynlora.importance.magnitude import MagnitudeMetric
from tests.lora_layers import layers_of, lora_chain, one_layer


@torch.no_grad()
def test_the_score_is_the_norm_of_the_added_weight_over_the_root_of_the_cost():
    layers = layers_of(lora_chain(12, 8, 40))
    expected = {}
    for layer in layers:
        inputs = torch.eye(layer.in_features, dtype=torch.float64)
        added = layer.module(inputs) - layer.module.get_base_layer()(inputs)
        expected[layer.name] = pytest.approx(float(added.norm()) / math.sqrt(layer.cost))
    assert MagnitudeMetric().scores(layers, {}) == expected


def test_an_adapter_that_adds_nothing_scores_zero():
    layer = one_layer()
    layer.lora_B.data.zero_()
    assert MagnitudeMetric().scores([layer], {}) == {layer.name: 0.0}


@torch.no_grad()
def test_factors_that_cancel_out_do_not_count():
    layer = one_layer()
    layer.lora_A[1], layer.lora_B[:, 1] = layer.lora_A[0], -layer.lora_B[:, 0]
    layer.lora_A[2:], layer.lora_B[:, 2:] = 0, 0
    assert MagnitudeMetric().scores([layer], {})[layer.name] == pytest.approx(0, abs=1e-6)
