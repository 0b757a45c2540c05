"""Resizing one layer: what stays bit for bit, no direction dies, and what is new."""

import pytest
import torch
from torch.optim import AdamW

from dynlora.adapters.resize import (
    apply_change,
    grow_change,
    new_rows,
    principal_directions,
    reorder_change,
    shrink_changes,
    split_projectors,
)
from dynlora.adapters.strengths import lowest_ranks, measure_strengths
from tests.lora_layers import added, one_layer, stack


def grow(layer, rank, *, tokens=None):
    generator = torch.Generator().manual_seed(0)
    [growth] = new_rows([layer], [rank - layer.r], [tokens], generator=generator)
    apply_change(layer, optimizer_of(layer), grow_change(layer, rank), growth)


def shrink(layer, rank, *, tokens=None):
    strengths = measure_strengths([layer], [tokens])
    [change] = shrink_changes([layer], strengths, [rank])
    apply_change(layer, optimizer_of(layer), change)


def optimizer_of(layer):
    return AdamW(layer.parameters, lr=0.01)


def tokens_along(*spreads):
    """Return inputs with these standard deviations along random orthogonal directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    noise = torch.randn(200, len(spreads), generator=generator)
    return (noise * torch.tensor(spreads)) @ directions[:, : len(spreads)].T + 1.0


def dead_directions(layer):
    """Count directions without strength whose row is too small for their column to ever learn."""
    rows, columns = layer.lora_A.detach().norm(dim=1), layer.lora_B.detach().norm(dim=0)
    return int(((rows < 1e-2 * rows.max()) & (columns < 1e-2 * columns.max())).sum())


def test_an_adapter_that_was_never_trained_shrinks_without_loss_and_stays_alive():
    layer = one_layer()
    layer.lora_B.data.zero_()
    A = layer.lora_A.clone()
    [[strengths]] = measure_strengths([layer], [None])
    assert torch.equal(strengths.values, torch.zeros(4, dtype=torch.float64))
    shrink(layer, 2)
    assert torch.equal(layer.lora_A, A[:2])
    assert torch.equal(layer.lora_B, torch.zeros(8, 2, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [None, tokens_along(3.0, 2.0, 1.0, 0.5, 0.4)])
@pytest.mark.parametrize("rank", [7, 3, 1])
def test_no_direction_dies_where_the_rank_exceeds_the_outputs(rank, tokens):
    layer = one_layer(12, 3, r=8)
    before = added(layer)
    shrink(layer, rank, tokens=tokens)
    assert layer.r == rank
    assert dead_directions(layer) == 0
    if rank >= 3:
        torch.testing.assert_close(added(layer), before)


def test_no_direction_dies_where_columns_repeat_one_another():
    layer = one_layer(12, 8, r=4)
    layer.lora_B.data[:, 2] = layer.lora_B.data[:, 0]
    layer.lora_B.data[:, 3] = 2 * layer.lora_B.data[:, 1]
    before = added(layer)
    shrink(layer, 3)
    torch.testing.assert_close(added(layer), before)
    assert dead_directions(layer) == 0


def projector_of(rank, size=5, *, orthogonal):
    left = torch.randn(size, rank, dtype=torch.float64)
    right = left if orthogonal else torch.randn(size, rank, dtype=torch.float64)
    return left @ torch.linalg.inv(right.T @ left) @ right.T


@pytest.mark.parametrize(("rank", "orthogonal"), [(1, True), (2, False), (4, False)])
def test_a_projector_is_split_into_maps_whose_product_it_is(rank, orthogonal):
    projector = projector_of(rank, orthogonal=orthogonal)
    U, S, Vh = torch.linalg.svd(projector)
    [to_A], [to_B] = split_projectors(Vh[None, :rank], (U[:, :rank] * S[:rank])[None])
    assert (to_A.shape, to_B.shape) == ((rank, 5), (5, rank))
    torch.testing.assert_close(to_B @ to_A, projector)
    torch.testing.assert_close(to_A @ to_B, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(to_A @ to_A.T, to_B.T @ to_B)


@pytest.mark.parametrize("tokens", [None, tokens_along(3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2)])
@pytest.mark.parametrize(("outputs", "r"), [(8, 4), (3, 8)])
def test_reordering_keeps_the_function_sorts_by_strength_and_kills_no_direction(tokens, outputs, r):
    layer = one_layer(12, outputs, r=r)
    before = added(layer)
    [[strengths]] = measure_strengths([layer], [tokens])
    apply_change(layer, optimizer_of(layer), reorder_change(layer, [strengths]))
    torch.testing.assert_close(added(layer), before)
    assert dead_directions(layer) == 0
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    inputs = torch.eye(12, dtype=torch.float64) if tokens is None else tokens.double()
    count = 1 if tokens is None else len(tokens)
    parts = [layer.scaling * torch.outer(inputs @ A[k], B[:, k]).norm() for k in range(r)]
    measured = torch.stack(parts) / count**0.5
    torch.testing.assert_close(measured, strengths.values)
    strong = measured[:outputs]
    assert torch.equal(strong, strong.sort(descending=True).values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_backward_works_at_the_new_rank_while_an_old_graph_is_alive(dtype):
    layer = one_layer(dtype=dtype)
    inputs = torch.randn(3, 12, dtype=dtype)
    kept = layer.module(inputs).sum()
    kept.backward(retain_graph=True)
    grow(layer, 6)
    layer.module(inputs).sum().backward()
    assert layer.grad_A.shape == (6, 12)
    assert layer.grad_B.shape == (8, 6)
    assert layer.lora_A.dtype == dtype
    assert torch.isfinite(kept)


def test_half_precision_weights_are_resized_within_their_rounding():
    exact, rounded = one_layer(), one_layer(dtype=torch.bfloat16)
    for weight, source in ((exact.lora_A, rounded.lora_A), (exact.lora_B, rounded.lora_B)):
        weight.data = source.detach().double()
    shrink(exact, 2)
    shrink(rounded, 2)
    torch.testing.assert_close(added(rounded).double(), added(exact), atol=0.03, rtol=0.03)


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


def test_layers_of_different_ranks_are_told_their_own_lowest():
    squares = [torch.ones(1), torch.ones(4), torch.tensor([4.0, 0.0, 0.0])]
    assert lowest_ranks(squares, [0.5, 1.5, 0.5]) == [1, 2, 1]
    assert lowest_ranks(squares, [0.0, 0.0, 0.0]) == [1, 4, 1]


def test_directions_whose_column_is_zero_are_not_trained():
    layers = [one_layer(), one_layer(), one_layer(12, 3, r=8), one_layer(), one_layer(20, 8, r=6)]
    layers[1].lora_B.data[:, 2] = 0
    layers[3].lora_B.data.zero_()
    layers[4].lora_B.data[:, [0, 3]] = 0
    measured = measure_strengths(layers, [None] * 5)
    trained = [found.order[: found.trained] for [found] in measured]
    assert trained == [[0, 1, 2, 3], [0, 1, 3], list(range(8)), [], [1, 2, 4, 5]]


@torch.no_grad()
def test_each_expert_of_a_stack_shrinks_to_the_best_of_its_own_components():
    layer = stack(3)
    layer.lora_B[0] = 0  # an expert without tokens
    layer.lora_B[1][:, 2] = 0
    before = layer.module.get_delta_weight("default")
    shrink(layer, 3)
    U, S, Vh = torch.linalg.svd(before)
    best = (U[..., :3] * S[:, None, :3]) @ Vh[:, :3]
    torch.testing.assert_close(layer.module.get_delta_weight("default"), best)
    assert layer.lora_A[0].any(dim=1).all()
