"""Shrinking against a dense SVD of what the layer adds on the same tokens (Eckart and Young)."""

import pytest
import torch
from torch.optim import AdamW

from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.types import RankPlan
from tests.lora_layers import added, layers_of, lora_chain, stats_of

SHAPES = [((12, 8), 1), ((8, 12), 2), ((10, 10), 3), ((40, 5), 2), ((5, 40), 3)]


def inputs_of(n_in, *, count=64, seed=0):
    """Return inputs that are correlated and not centred, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=generator)
    return torch.randn(count, n_in, generator=generator) @ mix + 0.5


def shrink(model, rank, features):
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    adapters = LoraAdapters(model, optimizer, None, follow=lambda change: None)
    return adapters.apply(RankPlan(step=0, ranks={"0": rank}), features, seed=0)["0"]


def best(matrix, rank):
    """Return the closest matrix of that rank, and the norm of what is missing."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], float(S[rank:].square().sum().sqrt())


@pytest.mark.parametrize("untrained", [(), (1, 3)])
@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_what_is_kept_is_the_best_of_its_rank_on_the_tokens_seen(shape, rank, untrained):
    model = lora_chain(*shape, r=4)
    (layer,) = layers_of(model)
    layer.lora_B.data[:, list(untrained)] = 0
    features = stats_of(layer, inputs_of(shape[0]))
    inputs = features.tokens.double()
    with torch.no_grad():
        whole = layer.module(inputs).norm()
    expected, missing = best(inputs @ added(layer).T, rank)
    lost = shrink(model, rank, {"0": features})
    assert layer.r == rank
    torch.testing.assert_close(inputs @ added(layer).T, expected, rtol=1e-7, atol=1e-7)
    assert lost == pytest.approx(missing / float(whole), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_without_tokens_what_is_kept_is_the_best_weight_of_its_rank(shape, rank):
    model = lora_chain(*shape, r=4)
    (layer,) = layers_of(model)
    base = layer.module.get_base_layer().weight.detach().norm()
    expected, missing = best(added(layer), rank)
    lost = shrink(model, rank, {})
    torch.testing.assert_close(added(layer), expected, rtol=1e-9, atol=1e-9)
    assert lost == pytest.approx(missing / float(base), rel=1e-9)


@pytest.mark.parametrize("seen", [True, False])
def test_directions_that_repeat_one_another_are_dropped_without_loss(seen):
    model = lora_chain(12, 8, r=5)
    (layer,) = layers_of(model)
    layer.lora_B.data[:, 3] = layer.lora_B.data[:, 0] - 2 * layer.lora_B.data[:, 1]
    layer.lora_A.data[4] = layer.lora_A.data[2]
    features = {"0": stats_of(layer, inputs_of(12))} if seen else {}
    before = added(layer)
    lost = shrink(model, 4, features)
    torch.testing.assert_close(added(layer), before, rtol=1e-6, atol=1e-6)
    assert lost == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_in_single_precision_the_truncation_is_within_its_rounding(rank):
    model = lora_chain(48, 32, r=8, dtype=torch.float32)
    (layer,) = layers_of(model)
    features = stats_of(layer, inputs_of(48, count=256))
    inputs = features.tokens.double()
    exact = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    expected, _ = best(inputs @ exact.T, rank)
    shrink(model, rank, {"0": features})
    kept = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    torch.testing.assert_close(
        inputs @ kept.T, expected, rtol=0, atol=1e-6 * float(expected.abs().max())
    )
