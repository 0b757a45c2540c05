"""The running mean gradient against the weighted mean written out, and through changes of basis."""

import torch

from dynlora.importance.averages import DECAY, RunningMeanGradient
from dynlora.types import BasisChange
from tests.lora_layers import layers_of, lora_chain, one_layer, set_gradient_B, set_gradients


def written_out(gradients):
    """Return the sum of DECAY^age * gradient over the sum of DECAY^age."""
    ages = range(len(gradients) - 1, -1, -1)
    weights = torch.tensor([DECAY**age for age in ages], dtype=torch.float64)
    stacked = torch.stack([gradient.double() for gradient in gradients])
    return (weights[:, None, None] * stacked).sum(dim=0) / weights.sum()


def observe_random(mean, layer, steps, *, first=0):
    seen = []
    for step in range(first, first + steps):
        set_gradients([layer], seed=step)
        mean.observe([layer])
        seen.append(layer.lora_B.grad.clone())
    return seen


def test_the_mean_is_the_exponentially_weighted_mean_without_startup_bias():
    layer, mean = one_layer(), RunningMeanGradient()
    seen = []
    for step in range(40):
        seen += observe_random(mean, layer, 1, first=step)
        torch.testing.assert_close(
            mean.mean(layer.name).double(), written_out(seen), rtol=1e-5, atol=1e-6
        )


def test_a_layer_observed_later_or_less_often_has_no_smaller_mean():
    layers, mean = layers_of(lora_chain(12, 8, 12)), RunningMeanGradient()
    for step in range(30):
        for layer in layers:
            set_gradient_B(layer, torch.ones(layer.out_features, 4))
        mean.observe(layers if step % 7 == 3 else layers[:1])
    for layer in layers:
        expected = torch.ones(layer.out_features, 4)
        torch.testing.assert_close(mean.mean(layer.name), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_gradients_are_averaged_in_float32():
    layer, mean = one_layer(dtype=torch.bfloat16), RunningMeanGradient()
    seen = observe_random(mean, layer, 30)
    assert mean.mean(layer.name).dtype == torch.float32
    torch.testing.assert_close(
        mean.mean(layer.name).double(), written_out(seen), rtol=1e-5, atol=1e-6
    )


def test_after_a_change_of_basis_the_mean_is_that_of_the_gradients_in_the_new_basis():
    layer, mean = one_layer(), RunningMeanGradient()
    seen = observe_random(mean, layer, 20)
    to_A = torch.randn(3, 4, dtype=torch.float64)
    mean.rebase(BasisChange(name=layer.name, to_A=to_A, to_B=torch.linalg.pinv(to_A)))
    # With A' = to_A @ A, dL/dB' is dL/dB @ to_A.T.
    in_new_basis = [gradient @ to_A.T for gradient in seen]
    torch.testing.assert_close(
        mean.mean(layer.name).double(), written_out(in_new_basis), rtol=1e-5, atol=1e-5
    )


def test_a_grown_direction_starts_with_a_mean_of_zero():
    layer, mean = one_layer(), RunningMeanGradient()
    observe_random(mean, layer, 5)
    before = mean.mean(layer.name)
    eye = torch.eye(6, 4, dtype=torch.float64)
    mean.rebase(BasisChange(name=layer.name, to_A=eye, to_B=eye.T))
    after = mean.mean(layer.name)
    assert torch.equal(after[:, :4], before)
    assert torch.equal(after[:, 4:], torch.zeros(8, 2))
