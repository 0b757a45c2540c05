"""Gradients of consecutive steps: layers compared together are as each by itself."""

import pytest
import torch

from dynlora.importance.consecutive import ConsecutiveGradients
from dynlora.types import BasisChange
from tests.lora_layers import layers_of, lora_chain, set_gradients

RANKS = [1, 2, 3, 4, 4, 5, 6, 8, 8, 9, 3, 16]


def layers_of_ranks():
    """Return layers of two heights in turn."""
    widths = [18 + 2 * (place % 2) for place in range(len(RANKS) + 1)]
    pattern = {str(place): rank for place, rank in enumerate(RANKS)}
    return layers_of(lora_chain(*widths, r=2, rank_pattern=pattern))


@pytest.mark.parametrize("broken", [(), ((1, 3), (0, 6))])
def test_layers_of_any_ranks_are_compared_as_each_by_itself(broken):
    layers = layers_of_ranks()
    together, alone = ConsecutiveGradients(), [ConsecutiveGradients() for _ in layers]
    for step in range(3):
        set_gradients(layers, seed=step)
        for place in (place for when, place in broken if when == step):
            layers[place].lora_B.grad[0, 0] = torch.nan
        found = together.observe(layers)
        assert sorted(found.names) == sorted(layer.name for layer in layers)
        for layer, one in zip(layers, alone, strict=True):
            place, expected = found.names.index(layer.name), one.observe([layer])
            for key in ("inner", "overlaps", "lengths"):
                pair = getattr(found, key)[place], getattr(expected, key)[0]
                torch.testing.assert_close(*pair, equal_nan=True, rtol=1e-12, atol=1e-12)


def test_layers_that_a_step_leaves_out_are_compared_with_their_last_gradient():
    layers = layers_of_ranks()
    together, alone = ConsecutiveGradients(), {x.name: ConsecutiveGradients() for x in layers}
    reached = [layers, layers, layers[:5], layers[3:], layers, layers]
    for step, shown in enumerate(reached):
        set_gradients(layers, seed=step)
        found = together.observe(shown)
        expected = {x.name: alone[x.name].observe([x]).inner for x in shown}
        inner = torch.cat([expected[name] for name in found.names])
        torch.testing.assert_close(found.inner, inner, equal_nan=True, rtol=1e-12, atol=1e-12)


def test_layers_whose_basis_changed_alone_are_left_out_of_a_comparison():
    layers, gradients = layers_of_ranks(), ConsecutiveGradients()
    for step in range(4):
        set_gradients(layers, seed=step)
        found = gradients.observe(layers)
        unknown = {n for n, x in zip(found.names, found.lengths, strict=True) if x.isnan()}
        assert unknown == ({x.name for x in layers} if step == 0 else {layers[4].name})
        eye = torch.eye(layers[4].r, dtype=torch.float64)
        gradients.rebase(BasisChange(name=layers[4].name, to_A=eye, to_B=eye))


def test_what_is_kept_of_each_layer_is_its_last_gradient():
    layers, gradients = layers_of_ranks(), ConsecutiveGradients()
    for step in range(2):
        set_gradients(layers, seed=step)
        gradients.observe(layers)
    kept = gradients.state_dict()
    assert all(torch.equal(kept[layer.name], layer.lora_B.grad) for layer in layers)


def test_gradients_are_compared_across_a_change_of_precision():
    model = lora_chain(12, 12, 12, dtype=torch.float32)
    gradients = ConsecutiveGradients()
    for dtype in (torch.float32, torch.float64, torch.float64, torch.bfloat16):
        model.to(dtype)
        layers = layers_of(model)
        set_gradients(layers, seed=0)
        found = gradients.observe(layers)
        gradients.load_state_dict(gradients.state_dict())  # as a run does that is resumed
    torch.testing.assert_close(found.inner, found.lengths, rtol=1e-2, atol=0)
