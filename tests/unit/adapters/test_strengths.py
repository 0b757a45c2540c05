"""How much components add, and how many of them must stay."""

import pytest
import torch

from dynlora.adapters.strengths import (
    component_powers,
    lowest_ranks,
    measure_strengths,
)
from tests.lora_layers import one_layer
from tests.resized_layers import tokens_along


def test_layers_of_different_ranks_are_told_their_own_lowest():
    powers = [torch.ones(1), torch.ones(4), torch.tensor([0.0, 0.0, 4.0])]
    assert lowest_ranks(powers, [0.5, 1.5, 0.5]) == [1, 2, 1]


@pytest.mark.parametrize("tokens", [None, tokens_along(3.0, 2.0, 1.0, 0.5)])
def test_the_powers_of_components_are_the_squares_of_their_strengths(tokens):
    layer = one_layer()
    layer.lora_B.data[:, 2] = 0  # grown, and not trained yet
    [powers] = component_powers([layer], [tokens])
    [strengths] = measure_strengths([layer], [tokens])
    expected = strengths.values.square().flip(0)
    torch.testing.assert_close(powers, expected, rtol=1e-9, atol=0)
    assert powers[0] == 0


def test_directions_whose_column_is_zero_are_not_trained():
    layers = [one_layer(), one_layer(), one_layer(12, 3, r=8), one_layer(), one_layer(20, 8, r=6)]
    layers[1].lora_B.data[:, 2] = 0
    layers[3].lora_B.data.zero_()
    layers[4].lora_B.data[:, [0, 3]] = 0
    measured = measure_strengths(layers, [None] * 5)
    trained = [found.order[: found.trained] for found in measured]
    assert trained == [[0, 1, 2, 3], [0, 1, 3], list(range(8)), [], [1, 2, 4, 5]]
