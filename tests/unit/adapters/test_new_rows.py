"""New rows of `lora_A`: what input they see, how long they are, and what is drawn at random."""

import pytest
import torch

from dynlora.adapters.new_rows import new_rows, principal_directions
from tests.lora_layers import one_layer
from tests.resized_layers import grow, tokens_along


def test_a_new_row_along_which_the_input_hardly_varies_is_at_most_ten_times_as_long_as_usual():
    layer, unseen = one_layer(), one_layer()
    usual = layer.lora_A.detach().square().sum(dim=1).mean().sqrt()
    grow(layer, 9, tokens=tokens_along(30.0, 1e-4, 1e-4, 1e-4, 1e-4))
    norms = layer.lora_A.detach()[4:].norm(dim=1)
    assert norms.max() <= 10 * usual * (1 + 1e-9)
    assert norms.max() > 9.9 * usual
    grow(unseen, 9)  # without inputs
    torch.testing.assert_close(unseen.lora_A.detach()[4:].norm(dim=1), usual.expand(5))


def test_new_rows_are_the_inputs_directions_of_largest_variance_not_yet_covered():
    layer = one_layer()
    tokens = tokens_along(5.0, 4.0, 3.0, 2.0, 1.0, 0.9, 0.8, 0.7)
    A = layer.lora_A.detach().clone()
    grow(layer, 7, tokens=tokens)
    # The oracle: eigenvectors of the covariance with the span of A projected out.
    uncovered = torch.eye(12, dtype=torch.float64) - torch.linalg.pinv(A) @ A
    covariance = torch.cov(tokens.double().T, correction=0)
    _, vectors = torch.linalg.eigh(uncovered @ covariance @ uncovered)
    expected = vectors[:, [-1, -2, -3]].T
    rows = layer.lora_A.detach()[4:]
    cosines = (rows / rows.norm(dim=1, keepdim=True)) @ expected.T
    torch.testing.assert_close(cosines.abs(), torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_where_inputs_show_too_few_directions_the_rest_are_random_and_live():
    layer = one_layer()
    grow(layer, 8, tokens=tokens_along(2.0))  # one direction that varies
    assert torch.linalg.matrix_rank(layer.lora_A.detach()) == 8


@pytest.mark.parametrize(("count", "width"), [(12, 30), (30, 12)])
def test_principal_directions_are_an_svds_above_the_floor(count, width):
    tokens = torch.randn(count, width, dtype=torch.float64)
    _, spread, expected = torch.linalg.svd(tokens, full_matrices=False)
    [found] = principal_directions([tokens], [8], floors=[spread[5] * 1.0001])
    assert found.shape == (5, width)
    signs = (found * expected[:5]).sum(dim=1).sign()
    torch.testing.assert_close(found, expected[:5] * signs[:, None], rtol=1e-9, atol=1e-9)


def test_rows_that_no_input_shows_are_drawn_on_the_cpu_whatever_device_is_the_default():
    layer = one_layer()
    with torch.device("meta"):
        [rows] = new_rows([layer], [3], [None], generator=torch.Generator("cpu").manual_seed(1))
    [expected] = new_rows([layer], [3], [None], generator=torch.Generator("cpu").manual_seed(1))
    assert torch.equal(rows, expected)
