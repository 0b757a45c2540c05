"""`signal`: the norm of the mean gradient, per square root of the cost."""

import math

import pytest
import torch

from dynlora.importance.signal import SignalMetric
from tests.lora_layers import layers_of, lora_chain, one_layer, set_gradient_B


def observe(metric, layer, gradients):
    for gradient in gradients:
        set_gradient_B(layer, gradient)
        metric.observe([layer])


def test_the_score_is_the_norm_of_the_mean_gradient_over_the_root_of_the_cost():
    layer, metric = one_layer(12, 8), SignalMetric()
    gradient = torch.randn(8, 4)
    observe(metric, layer, [gradient] * 3)
    expected = math.sqrt(float((gradient**2).sum())) / math.sqrt(12 + 8)
    assert metric.scores([layer], {}) == {layer.name: pytest.approx(expected, rel=1e-5)}


def test_noise_averages_out_and_a_steady_need_stays():
    noisy, steady = layers_of(lora_chain(8, 8, 8))
    metric = SignalMetric()
    gradient = torch.randn(8, 4)
    for step in range(100):
        set_gradient_B(noisy, gradient * (-1) ** step)
        set_gradient_B(steady, 0.1 * gradient)
        metric.observe([noisy, steady])
    scores = metric.scores([noisy, steady], {})
    assert scores[noisy.name] < 0.5 * scores[steady.name]
