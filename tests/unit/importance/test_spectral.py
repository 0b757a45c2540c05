"""`spectral`: the mean singular value of the mean gradient, per square root of the cost."""

import math

import pytest
import torch

from dynlora.importance.spectral import SpectralMetric
from dynlora.types import BasisChange
from tests.lora_layers import layers_of, lora_chain, one_layer, set_gradient_B


def with_singular_values(*values):
    left = torch.linalg.qr(torch.randn(8, 4)).Q
    right = torch.linalg.qr(torch.randn(4, 4)).Q
    return left @ torch.diag(torch.tensor(values)) @ right.T


def observe(metric, layer, gradient):
    set_gradient_B(layer, gradient)
    metric.observe([layer])


def test_the_score_is_the_mean_singular_value_over_the_root_of_the_cost():
    layer, metric = one_layer(12, 8), SpectralMetric()
    observe(metric, layer, with_singular_values(4.0, 3.0, 1.0, 0.0))
    expected = (4 + 3 + 1 + 0) / 4 / math.sqrt(20)
    assert metric.scores([layer], {}) == {layer.name: pytest.approx(expected, rel=1e-5)}


def test_of_two_needs_of_equal_norm_the_one_with_more_directions_scores_higher():
    one, many = layers_of(lora_chain(8, 8, 8))
    metric = SpectralMetric()
    observe(metric, one, with_singular_values(2.0, 0.0, 0.0, 0.0))
    observe(metric, many, with_singular_values(1.0, 1.0, 1.0, 1.0))
    scores = metric.scores([one, many], {})
    assert scores[many.name] == pytest.approx(2 * scores[one.name], rel=1e-5)


def test_rotating_the_rank_dimension_leaves_the_score():
    layer, metric = one_layer(), SpectralMetric()
    observe(metric, layer, torch.randn(8, 4))
    before = metric.scores([layer], {})[layer.name]
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    metric.rebase(BasisChange(name=layer.name, to_A=turn, to_B=turn.T))
    assert metric.scores([layer], {})[layer.name] == pytest.approx(before, rel=1e-5)
