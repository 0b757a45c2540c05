"""The running mean gradient against the weighted mean written out, and through changes of basis."""

import pytest
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


def observe_random(mean, layer, steps):
    seen = []
    for step in steps:
        set_gradients([layer], seed=step)
        mean.observe([layer])
        seen.append(layer.lora_B.grad.clone())
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_mean_is_the_exponentially_weighted_mean_without_startup_bias_in_float32(dtype):
    layer, mean, seen = one_layer(dtype=dtype), RunningMeanGradient(), []
    for step in range(40):
        seen += observe_random(mean, layer, [step])
        found = mean.mean(layer.name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), written_out(seen), rtol=1e-5, atol=1e-6)


def test_a_layer_observed_later_or_less_often_has_no_smaller_mean():
    layers, mean = layers_of(lora_chain(12, 8, 12)), RunningMeanGradient()
    for step in range(30):
        for layer in layers:
            set_gradient_B(layer, torch.ones(layer.out_features, 4))
        mean.observe(layers if step % 7 == 3 else layers[:1])
    for layer in layers:
        expected = torch.ones(layer.out_features, 4)
        torch.testing.assert_close(mean.mean(layer.name), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [3, 6])
def test_after_a_change_of_basis_the_mean_is_that_of_the_gradients_in_the_new_basis(rank):
    layer, mean = one_layer(), RunningMeanGradient()
    to_A = torch.randn(rank, 4, dtype=torch.float64)
    to_A[4:] = 0
    seen = observe_random(mean, layer, range(20))
    mean.rebase(BasisChange(name=layer.name, to_A=to_A, to_B=torch.linalg.pinv(to_A)))
    # With A' = to_A @ A, dL/dB' is dL/dB @ to_A.T; grown directions have a mean of zero.
    in_new_basis = written_out([gradient @ to_A.T for gradient in seen])
    found = mean.mean(layer.name).double()
    torch.testing.assert_close(found, in_new_basis, rtol=1e-5, atol=1e-5)
    assert not found[:, 4:].any()
