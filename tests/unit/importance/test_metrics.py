"""Each metric's score against its closed form; attention is in `test_attention_entropy.py`."""

import math

import pytest
import torch

from dynlora.importance.activation_ratio import ActivationRatioMetric
from dynlora.importance.agreement import GradientDirections
from dynlora.importance.consecutive import ConsecutiveGradients
from dynlora.importance.controls import RandomMetric
from dynlora.importance.fisher import FisherMetric
from dynlora.importance.gradient_norm import DECAY, GradientNormMetric
from dynlora.importance.magnitude import MagnitudeMetric
from dynlora.importance.sensitivity import SensitivityMetric
from dynlora.importance.signal import SignalMetric
from dynlora.importance.spectral import SpectralMetric
from dynlora.types import BasisChange, FeatureStats
from tests.lora_layers import (
    layers_of,
    lora_chain,
    one_layer,
    set_gradient_B,
    set_gradients,
    stack,
    stats_of,
)


def score(metric, layer):
    return metric.scores([layer], {})[layer.name]


def observe(metric, layers, steps):
    """Show random gradients; return the elements of both factors by layer, (steps, elements)."""
    shown = {layer.name: [] for layer in layers}
    for step in steps:
        set_gradients(layers, seed=step)
        metric.observe(layers)
        for layer in layers:
            shown[layer.name].append(torch.cat([layer.grad_A.flatten(), layer.grad_B.flatten()]))
    return {name: torch.stack(rows) for name, rows in shown.items()}


def observe_equal(metric, layer, value):
    """Show one step in which every element of the gradient has this value."""
    for weight in (layer.lora_A, layer.lora_B):
        weight.grad = torch.full_like(weight, value)
    metric.observe([layer])


# Of weights and activations.


@torch.no_grad()
def test_magnitude_is_the_norm_of_the_added_weight_over_the_root_of_the_cost():
    layers = layers_of(lora_chain(12, 8, 40))
    expected = {}
    for layer in layers:
        inputs = torch.eye(layer.in_features, dtype=torch.float64)
        added = layer.module(inputs) - layer.module.get_base_layer()(inputs)
        expected[layer.name] = pytest.approx(float(added.norm()) / math.sqrt(layer.cost))
    assert MagnitudeMetric().scores(layers, {}) == expected
    layer = layers[0]  # of factors that cancel out
    layer.lora_A[1], layer.lora_B[:, 1] = layer.lora_A[0], -layer.lora_B[:, 0]
    layer.lora_A[2:], layer.lora_B[:, 2:] = 0, 0
    assert score(MagnitudeMetric(), layer) == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_activation_ratio_is_the_part_of_the_output_that_the_adapter_adds():
    seen, unseen, silent = layers_of(lora_chain(8, 8, 8, 8))
    tokens = torch.randn(30, 8)
    features = {
        seen.name: stats_of(seen, tokens),
        silent.name: FeatureStats(tokens=tokens, variance=1.0, effective_rank=5.0, output_power=0),
    }
    whole = seen.module(tokens.double())
    added = whole - seen.module.get_base_layer()(tokens.double())
    scores = ActivationRatioMetric().scores([seen, unseen, silent], features)
    assert scores == {seen.name: pytest.approx(float(added.norm() / whole.norm()), rel=1e-5)}
    seen.lora_B.zero_()
    features = {seen.name: stats_of(seen, tokens)}
    assert ActivationRatioMetric().scores([seen], features) == {seen.name: 0.0}


# Of gradients.


def test_fisher_is_the_mean_square_of_all_elements_over_all_steps():
    layers, metric = layers_of(lora_chain(12, 8, 6)), FisherMetric()
    shown = observe(metric, layers, range(25))
    expected = {n: pytest.approx(float(g.square().mean())) for n, g in shown.items()}
    assert metric.scores(layers, {}) == expected


def test_gradient_norm_is_the_root_of_the_weighted_mean_power_over_the_cost():
    layer, metric = one_layer(12, 8), GradientNormMetric()
    powers = observe(metric, [layer], range(25))[layer.name].square().sum(dim=1)
    weights = torch.tensor([DECAY**age for age in range(24, -1, -1)], dtype=torch.float64)
    mean = float((weights * powers).sum() / weights.sum())
    assert score(metric, layer) == pytest.approx(math.sqrt(mean / (12 + 8)), rel=1e-5)


def test_signal_is_the_norm_of_the_mean_gradient_in_which_noise_cancels():
    noisy, steady = layers_of(lora_chain(8, 8, 8))
    signal, norm = SignalMetric(), GradientNormMetric()
    gradient = torch.randn(8, 4)
    for step in range(100):
        set_gradient_B(noisy, gradient * (-1) ** step)
        set_gradient_B(steady, 0.1 * gradient)
        signal.observe([noisy, steady])
        norm.observe([noisy, steady])
    expected = 0.1 * float(gradient.norm()) / math.sqrt(8 + 8)
    assert score(signal, steady) == pytest.approx(expected, rel=1e-5)
    assert score(signal, noisy) < 0.5 * score(signal, steady)
    assert score(norm, noisy) == pytest.approx(10 * expected, rel=1e-5)


def with_singular_values(*values):
    left, right = (torch.linalg.qr(torch.randn(n, 4)).Q for n in (8, 4))
    return left @ torch.diag(torch.tensor(values)) @ right.T


def test_spectral_is_the_mean_singular_value_of_the_mean_gradient_in_any_basis():
    layer, metric = one_layer(12, 8), SpectralMetric()
    set_gradient_B(layer, with_singular_values(4.0, 3.0, 1.0, 0.0))
    metric.observe([layer])
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    for _ in range(2):
        assert score(metric, layer) == pytest.approx(2 / math.sqrt(20), rel=1e-5)
        metric.rebase(BasisChange(name=layer.name, to_A=turn, to_B=turn.T))


@pytest.mark.parametrize("rank", [1, 7])
def test_after_a_change_of_rank_sensitivities_start_from_the_old_mean(rank):
    layer, metric = one_layer(12, 8), SensitivityMetric()
    observe(metric, [layer], range(4))
    before = metric.state_dict()
    means = {key: before[f"0/{key}"].mean(dim=(1, 2)) for key in "AB"}
    to_A = torch.eye(rank, 4, dtype=torch.float64)
    metric.rebase(BasisChange(name=layer.name, to_A=to_A, to_B=to_A.T))
    after = metric.state_dict()
    torch.testing.assert_close(after["0/A"], means["A"][:, None, None].expand(2, rank, 12))
    torch.testing.assert_close(after["0/B"], means["B"][:, None, None].expand(2, 8, rank))


def test_half_precision_and_small_gradients_neither_vanish_nor_overflow():
    layer, metric = one_layer(), FisherMetric()
    observe_equal(metric, layer, 1e-18)
    assert score(metric, layer) == pytest.approx(1e-36, rel=1e-5, abs=0)
    layer, metric = one_layer(200, 200, dtype=torch.float16), GradientNormMetric()
    observe_equal(metric, layer, 3e4)
    assert score(metric, layer) == pytest.approx(3e4 * 2, rel=1e-3)  # the root of four ranks
    layer, metric = one_layer(dtype=torch.float16), SensitivityMetric()
    for weight in (layer.lora_A, layer.lora_B):
        weight.data.fill_(1e-3)
    observe_equal(metric, layer, 1e-5)
    assert score(metric, layer) > 0


# Controls.


def test_random_scores_follow_the_seed_are_new_at_each_event_and_use_no_global_state():
    layers = layers_of(lora_chain(*[4] * 41, r=1))
    before = torch.get_rng_state()
    one, same, other = RandomMetric(3), RandomMetric(3), RandomMetric(4)
    first = one.scores(layers, {})
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert first == same.scores(layers[::-1], {})
    assert first != other.scores(layers, {})
    events = [first] + [one.scores(layers, {}) for _ in range(24)]
    drawn = [score for event in events for score in event.values()]
    assert len(set(drawn)) == 1000
    assert 0 < min(drawn) < max(drawn) <= 1


# Of stacks of experts.


@pytest.mark.parametrize(
    "metric",
    [
        FisherMetric,
        GradientNormMetric,
        MagnitudeMetric,
        SensitivityMetric,
        SignalMetric,
        SpectralMetric,
    ],
)
def test_a_stack_of_equal_experts_scores_and_points_as_one_of_them(metric):
    def equal(factor, experts):
        matrix = torch.randn(factor.matrix.shape[1:], generator=generator, dtype=torch.float64)
        return factor.from_matrix(matrix.repeat(experts, 1, 1))

    found = []
    for experts in (1, 3):
        layer, observer = stack(experts), metric()
        consecutive, directions = ConsecutiveGradients(), GradientDirections()
        generator = torch.Generator().manual_seed(0)
        for factor in layer.factors:
            factor.parameter.data = equal(factor, experts)
        for _ in range(4):
            for factor in layer.factors:
                factor.parameter.grad = equal(factor, experts)
            observer.observe([layer])
            directions.observe(consecutive.observe([layer]))
        found.append((score(observer, layer), directions.counts([layer])[layer.name]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][1] > 1
