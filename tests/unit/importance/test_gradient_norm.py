"""`gradient_norm`: root mean square gradient, averaged over steps, per root of the cost."""

import math

import pytest
import torch

from dynlora.importance.gradient_norm import DECAY, GradientNormMetric
from tests.lora_layers import one_layer, set_gradients


def observe(metric, layers, steps, *, first=0):
    """Return each step's gradient power by layer."""
    powers = []
    for step in range(first, first + steps):
        set_gradients(layers, seed=step)
        metric.observe(layers)
        powers.append(
            [float(layer.grad_A.square().sum() + layer.grad_B.square().sum()) for layer in layers]
        )
    return powers


def test_the_score_is_the_root_of_the_weighted_mean_power_over_the_cost():
    layer, metric = one_layer(12, 8), GradientNormMetric()
    powers = [power for (power,) in observe(metric, [layer], 25)]
    weights = [DECAY**age for age in range(24, -1, -1)]
    mean = math.fsum(w * p for w, p in zip(weights, powers, strict=True)) / math.fsum(weights)
    expected = math.sqrt(mean / (12 + 8))
    assert metric.scores([layer], {}) == {layer.name: pytest.approx(expected, rel=1e-5)}


def test_noise_does_not_average_out():
    layer, metric = one_layer(), GradientNormMetric()
    for step in range(50):
        layer.lora_A.grad = torch.zeros_like(layer.lora_A)
        layer.lora_B.grad = (-1.0) ** step * torch.ones_like(layer.lora_B)
        metric.observe([layer])
    assert metric.scores([layer], {})[layer.name] == pytest.approx(math.sqrt(8 * 4 / 20), rel=1e-5)


def test_half_precision_gradients_do_not_overflow():
    layer, metric = one_layer(200, 200, dtype=torch.float16), GradientNormMetric()
    for weight in (layer.lora_A, layer.lora_B):
        weight.grad = torch.full_like(weight, 3e4)
    metric.observe([layer])
    expected = 3e4 * 2  # the root of four ranks
    assert metric.scores([layer], {})[layer.name] == pytest.approx(expected, rel=1e-3)
