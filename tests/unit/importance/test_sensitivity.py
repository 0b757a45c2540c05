"""`sensitivity`: the mean of I * U over a layer's parameters; parity checks the averages."""

import pytest
import torch

from dynlora.importance.sensitivity import BETA, SensitivityMetric
from dynlora.types import BasisChange
from tests.lora_layers import layers_of, lora_chain, one_layer, set_gradients


def observe(metric, layers, steps, *, first=0):
    for step in range(first, first + steps):
        set_gradients(layers, seed=step)
        metric.observe(layers)


def test_the_first_observation_gives_the_closed_form():
    # I = (1 - b) s and U = (1 - b) |s - I| = (1 - b) b s, with s = |w * dL/dw|.
    layer, metric = one_layer(12, 8), SensitivityMetric()
    observe(metric, [layer], 1)
    products = [layer.lora_A.data * layer.grad_A, layer.lora_B.data * layer.grad_B]
    squares = sum(float(product.square().sum()) for product in products)
    expected = (1 - BETA) ** 2 * BETA * squares / (4 * 12 + 8 * 4)
    assert metric.scores([layer], {}) == {layer.name: pytest.approx(expected, rel=1e-5)}


def test_the_score_is_per_parameter_and_not_per_layer():
    small, large = layers_of(lora_chain(4, 4, 40))
    metric = SensitivityMetric()
    for layer in (small, large):
        for weight in (layer.lora_A, layer.lora_B):
            weight.data.fill_(0.5)
            weight.grad = torch.full_like(weight, 0.25)
    metric.observe([small, large])
    scores = metric.scores([small, large], {})
    assert scores[large.name] == pytest.approx(scores[small.name], rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_after_a_change_of_rank_every_element_starts_from_the_old_mean(rank):
    layer, metric = one_layer(12, 8), SensitivityMetric()
    observe(metric, [layer], 4)
    before = metric.state_dict()
    means = {key: before[f"0/{key}"].mean(dim=(1, 2)) for key in "AB"}
    to_A = torch.eye(rank, 4, dtype=torch.float64)
    metric.rebase(BasisChange(name=layer.name, to_A=to_A, to_B=to_A.T))
    after = metric.state_dict()
    expected_A = means["A"][:, None, None].expand(2, rank, 12)
    expected_B = means["B"][:, None, None].expand(2, 8, rank)
    torch.testing.assert_close(after["0/A"], expected_A)
    torch.testing.assert_close(after["0/B"], expected_B)


def test_products_that_float16_does_not_hold_are_scored():
    layer, metric = one_layer(12, 8, dtype=torch.float16), SensitivityMetric()
    for weight in (layer.lora_A, layer.lora_B):
        weight.data.fill_(1e-3)
        weight.grad = torch.full_like(weight, 1e-5)
    metric.observe([layer])
    assert metric.scores([layer], {})[layer.name] > 0
