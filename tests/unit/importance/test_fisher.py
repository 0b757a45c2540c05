"""`fisher`: mean squared gradient per parameter, over all steps."""

import pytest
import torch

from dynlora.importance.fisher import FisherMetric
from tests.lora_layers import layers_of, lora_chain, one_layer, set_gradients


def observe(metric, layers, steps, *, first=0):
    """Return every gradient element that each step showed, by layer."""
    shown = {layer.name: [] for layer in layers}
    for step in range(first, first + steps):
        set_gradients(layers, seed=step)
        metric.observe(layers)
        for layer in layers:
            shown[layer.name].append(torch.cat([layer.grad_A.flatten(), layer.grad_B.flatten()]))
    return shown


def test_the_score_is_the_mean_square_of_all_elements_over_all_steps():
    layers, metric = layers_of(lora_chain(12, 8, 6)), FisherMetric()
    shown = observe(metric, layers, 25)
    expected = {n: pytest.approx(float(torch.stack(g).square().mean())) for n, g in shown.items()}
    assert metric.scores(layers, {}) == expected


def test_old_steps_count_as_much_as_new_ones():
    layer = one_layer()
    scores = []
    for order in (range(30), reversed(range(30))):
        metric = FisherMetric()
        for step in order:
            set_gradients([layer], seed=step)
            metric.observe([layer])
        scores.append(metric.scores([layer], {})[layer.name])
    assert scores[0] == pytest.approx(scores[1], rel=1e-12)


def test_a_layer_does_not_score_higher_for_being_larger_or_of_higher_rank():
    scores = []
    for n_in, n_out, r in ((12, 8, 2), (12, 8, 8), (40, 24, 2)):
        layer, metric = one_layer(n_in, n_out, r=r), FisherMetric()
        for weight in (layer.lora_A, layer.lora_B):
            weight.grad = torch.full_like(weight, 0.3)
        metric.observe([layer])
        scores.append(metric.scores([layer], {})[layer.name])
    assert scores == [pytest.approx(0.09, rel=1e-6)] * 3


def test_small_gradients_keep_their_square():
    layer, metric = one_layer(), FisherMetric()
    layer.lora_A.grad = torch.full_like(layer.lora_A, 1e-18)
    layer.lora_B.grad = torch.full_like(layer.lora_B, 1e-18)
    metric.observe([layer])
    assert metric.scores([layer], {})[layer.name] == pytest.approx(1e-36, rel=1e-5, abs=0)
