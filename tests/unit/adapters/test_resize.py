"""Resizing one layer: what stays bit for bit, what new directions are, and no direction dies."""

import copy

import pytest
import torch
from torch.optim import AdamW

from dynlora.adapters.resize import (
    Strengths,
    apply_change,
    component_powers,
    grow_change,
    lowest_ranks,
    measure_strengths,
    new_rows,
    principal_directions,
    reorder_change,
    scale_change,
    set_data,
    set_rank,
    shrink_change,
    split_projector,
)
from tests.lora_layers import one_layer, set_gradients


def optimizer_of(layer):
    return AdamW([layer.lora_A, layer.lora_B], lr=0.01)


def added(layer):
    """Return what the adapter adds to the base weight."""
    return layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()


def grow(layer, rank, *, tokens=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    growth = new_rows(layer, rank - layer.r, tokens=tokens, generator=generator)
    apply_change(layer, optimizer_of(layer), grow_change(layer, rank), growth)


def shrink(layer, rank, *, tokens=None):
    change = shrink_change(layer, measure_strengths(layer, tokens), rank)
    apply_change(layer, optimizer_of(layer), change)


def dead_directions(layer):
    """Count directions without strength whose row is too small for their column to ever learn."""
    rows, columns = layer.lora_A.detach().norm(dim=1), layer.lora_B.detach().norm(dim=0)
    return int(((rows < 1e-2 * rows.max()) & (columns < 1e-2 * columns.max())).sum())


def tokens_along(*spreads, width=12, count=200, seed=0):
    """Return inputs with these standard deviations along random orthogonal directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    noise = torch.randn(count, len(spreads), generator=generator)
    return (noise * torch.tensor(spreads)) @ directions[:, : len(spreads)].T + 1.0


@pytest.mark.parametrize("tokens", [None, tokens_along(3.0, 2.0, 1.0, 0.5)])
def test_growing_keeps_every_weight_and_adds_nothing(tokens):
    layer = one_layer(dtype=torch.float32)
    A, B, before = layer.lora_A.clone(), layer.lora_B.clone(), added(layer)
    grow(layer, 6, tokens=tokens)
    assert torch.equal(layer.lora_A[:4], A)
    assert torch.equal(layer.lora_B[:, :4], B)
    assert torch.equal(layer.lora_B[:, 4:], torch.zeros(8, 2))
    assert torch.equal(added(layer), before)
    assert (layer.r, layer.scaling) == (6, 1.5)


def input_power(rows, tokens):
    return (tokens.double() @ rows.detach().T).square().mean(dim=0)


def test_each_new_row_sees_as_much_input_as_the_old_rows_do_on_average():
    layer = one_layer()
    tokens = tokens_along(30.0, 20.0, 18.0, 15.0, 12.0)
    grow(layer, 9, tokens=tokens)
    usual = input_power(layer.lora_A[:4], tokens).mean()
    torch.testing.assert_close(input_power(layer.lora_A[4:], tokens), usual.expand(5))


def test_a_new_row_along_which_the_input_hardly_varies_is_at_most_ten_times_as_long_as_usual():
    layer = one_layer()
    usual = layer.lora_A.detach().square().sum(dim=1).mean().sqrt()
    grow(layer, 9, tokens=tokens_along(30.0, 1e-4, 1e-4, 1e-4, 1e-4))
    norms = layer.lora_A.detach()[4:].norm(dim=1)
    assert norms.max() <= 10 * usual * (1 + 1e-9)
    assert norms.max() > 9.9 * usual


def test_without_inputs_new_rows_have_the_usual_norm_of_the_old():
    layer = one_layer()
    usual = layer.lora_A.detach().square().sum(dim=1).mean().sqrt()
    grow(layer, 9)
    torch.testing.assert_close(layer.lora_A.detach()[4:].norm(dim=1), usual.expand(5))


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


def test_new_rows_from_inputs_are_orthogonal_to_the_old():
    layer = one_layer()
    A = layer.lora_A.detach().clone()
    grow(layer, 6, tokens=tokens_along(5.0, 4.0, 3.0, 2.0, 1.0, 0.9, 0.8))
    products = layer.lora_A.detach()[4:] @ A.T
    torch.testing.assert_close(products, torch.zeros_like(products), atol=1e-6, rtol=0)


def test_where_inputs_show_too_few_directions_the_rest_are_random_and_live():
    layer = one_layer()
    grow(layer, 8, tokens=tokens_along(2.0))  # one direction that varies
    assert torch.linalg.matrix_rank(layer.lora_A.detach()) == 8


def test_inputs_of_zeros_still_give_live_rows():
    layer = one_layer()
    usual = layer.lora_A.detach().square().sum(dim=1).mean().sqrt()
    grow(layer, 6, tokens=torch.zeros(20, 12))
    torch.testing.assert_close(layer.lora_A.detach()[4:].norm(dim=1), usual.expand(2))


def test_new_rows_are_the_same_for_the_same_seed_and_leave_the_global_random_state():
    before = torch.get_rng_state()
    layers = [one_layer() for _ in range(3)]
    before = torch.get_rng_state()
    for layer, seed in zip(layers, (1, 1, 2), strict=True):
        grow(layer, 6, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(layers[0].lora_A, layers[1].lora_A)
    assert not torch.equal(layers[0].lora_A, layers[2].lora_A)


@pytest.mark.parametrize("rank", [6, 5, 4])
def test_dropping_only_untrained_directions_keeps_the_trained_bit_for_bit(rank):
    layer = one_layer(dtype=torch.float32)
    A, B = layer.lora_A.clone(), layer.lora_B.clone()
    grow(layer, 7)
    shrink(layer, rank)
    assert torch.equal(layer.lora_A[:4], A)
    assert torch.equal(layer.lora_B[:, :4], B)
    assert layer.r == rank
    assert dead_directions(layer) == 0


def test_untrained_directions_go_before_trained_ones():
    layer = one_layer()
    before = added(layer)
    layer.lora_B.data[:, 1] = 0  # untrained in the middle, and strong rows of A around it
    without = added(layer)
    assert not torch.allclose(before, without)
    shrink(layer, 3)
    torch.testing.assert_close(added(layer), without)


def test_an_adapter_that_was_never_trained_shrinks_without_loss_and_stays_alive():
    layer = one_layer()
    layer.lora_B.data.zero_()
    A = layer.lora_A.clone()
    strengths = measure_strengths(layer, None)
    assert torch.equal(strengths.values, torch.zeros(4, dtype=torch.float64))
    shrink(layer, 2)
    assert torch.equal(layer.lora_A, A[:2])
    assert torch.equal(layer.lora_B, torch.zeros(8, 2, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [None, tokens_along(3.0, 2.0, 1.0, 0.5, 0.4)])
@pytest.mark.parametrize("rank", [7, 5, 3, 2, 1])
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


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_projector_is_split_into_maps_whose_product_it_is(rank, orthogonal):
    projector = projector_of(rank, orthogonal=orthogonal)
    to_A, to_B = split_projector(projector, rank)
    assert (to_A.shape, to_B.shape) == ((rank, 5), (5, rank))
    torch.testing.assert_close(to_B @ to_A, projector)
    torch.testing.assert_close(to_A @ to_B, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(to_A @ to_A.T, to_B.T @ to_B)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_an_orthogonal_projector_is_split_into_a_pure_rotation(rank):
    to_A, to_B = split_projector(projector_of(rank, orthogonal=True), rank)
    torch.testing.assert_close(to_B, to_A.T)


@pytest.mark.parametrize("kept", [[0], [1, 3], [0, 2, 4], [0, 1, 2, 3]])
def test_a_selection_of_directions_is_split_into_that_selection(kept):
    selection = torch.eye(5, dtype=torch.float64)[kept]
    to_A, to_B = split_projector(selection.T @ selection, len(kept))
    torch.testing.assert_close(to_A, selection)
    torch.testing.assert_close(to_B, selection.T)


@pytest.mark.parametrize("tokens", [None, tokens_along(3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2)])
def test_reordering_keeps_the_function_and_sorts_by_strength(tokens):
    layer = one_layer()
    before = added(layer)
    strengths = measure_strengths(layer, tokens)
    apply_change(layer, optimizer_of(layer), reorder_change(layer, strengths))
    torch.testing.assert_close(added(layer), before)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    inputs = torch.eye(12, dtype=torch.float64) if tokens is None else tokens.double()
    count = 1 if tokens is None else len(tokens)
    parts = [layer.scaling * torch.outer(inputs @ A[k], B[:, k]).norm() for k in range(4)]
    measured = torch.stack(parts) / count**0.5
    torch.testing.assert_close(measured, strengths.values)
    assert torch.equal(measured, measured.sort(descending=True).values)


def test_no_direction_dies_by_reordering_where_the_rank_exceeds_the_outputs():
    layer = one_layer(12, 3, r=8)
    before = added(layer)
    change = reorder_change(layer, measure_strengths(layer, None))
    apply_change(layer, optimizer_of(layer), change)
    torch.testing.assert_close(added(layer), before)
    assert dead_directions(layer) == 0


def test_a_change_of_scale_keeps_the_function():
    layer = one_layer()
    before = added(layer)
    apply_change(layer, optimizer_of(layer), scale_change(layer, 1.6))
    assert layer.scaling == pytest.approx(1.5 * 1.6)
    assert layer.module.lora_alpha["default"] == pytest.approx(1.5 * 1.6 * 4)
    torch.testing.assert_close(added(layer), before)


def test_what_a_rank_loses_is_the_root_of_the_sum_of_squares_dropped():
    eye = torch.eye(4)
    strengths = Strengths(values=torch.tensor([8.0, 4.0, 3.0, 0.0]), to_A=eye, to_B=eye)
    assert [strengths.lost(rank) for rank in range(1, 5)] == [5.0, 3.0, 0.0, 0.0]
    assert strengths.relative_to(10.0).lost(1) == pytest.approx(0.5)
    assert strengths.relative_to(0.0).lost(1) == 5.0


@pytest.mark.parametrize(
    ("tolerated", "rank"), [(0.0, 3), (2.9, 3), (3.0, 2), (4.9, 2), (5.0, 1), (99.0, 1)]
)
def test_the_lowest_rank_is_the_first_whose_loss_is_tolerated(tolerated, rank):
    powers = torch.tensor([0.0, 3.0, 4.0, 8.0]).square()
    assert lowest_ranks([powers], torch.tensor([tolerated])) == [rank]


def test_a_layer_of_rank_one_cannot_go_lower():
    assert lowest_ranks([torch.ones(1)], torch.tensor([99.0])) == [1]


def test_layers_of_different_ranks_are_told_their_own_lowest():
    powers = [torch.ones(1), torch.ones(4), torch.tensor([0.0, 0.0, 4.0])]
    assert lowest_ranks(powers, torch.tensor([0.5, 1.5, 0.5])) == [1, 2, 1]


@pytest.mark.parametrize("tokens", [None, tokens_along(3.0, 2.0, 1.0, 0.5)])
def test_the_powers_of_components_are_the_squares_of_their_strengths(tokens):
    layer = one_layer()
    layer.lora_B.data[:, 2] = 0  # grown, and not trained yet
    powers = component_powers(layer, tokens)
    expected = measure_strengths(layer, tokens).values.square().flip(0)
    torch.testing.assert_close(powers, expected, rtol=1e-9, atol=0)
    assert powers[0] == 0


@pytest.mark.parametrize(("count", "width"), [(12, 30), (30, 12)])
def test_principal_directions_are_an_svds_above_the_floor(count, width):
    tokens = torch.randn(count, width, dtype=torch.float64)
    _, spread, expected = torch.linalg.svd(tokens, full_matrices=False)
    found = principal_directions(tokens, 8, floor=float(spread[5]) * 1.0001)
    assert found.shape == (5, width)
    signs = (found * expected[:5]).sum(dim=1).sign()
    torch.testing.assert_close(found, expected[:5] * signs[:, None], rtol=1e-9, atol=1e-9)


def test_set_data_keeps_the_object_and_forgets_the_gradient():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2)
    data = torch.randn(5, 2)
    same = parameter
    set_data(parameter, data)
    assert same is parameter
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter.requires_grad
    assert parameter.grad is None
    assert torch.equal(parameter, data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
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


def test_set_rank_gives_zero_tensors_and_keeps_the_scale():
    layer = one_layer()
    set_rank(layer, 7)
    assert (layer.r, layer.scaling) == (7, 1.5)
    assert torch.equal(layer.lora_A, torch.zeros(7, 12, dtype=torch.float64))
    assert torch.equal(layer.lora_B, torch.zeros(8, 7, dtype=torch.float64))


def test_set_rank_to_the_present_rank_changes_nothing():
    layer = one_layer()
    before = copy.deepcopy(layer.module.state_dict())
    set_rank(layer, 4)
    after = layer.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_half_precision_weights_are_resized_within_their_rounding():
    exact, rounded = one_layer(), one_layer(dtype=torch.bfloat16)
    for weight, source in ((exact.lora_A, rounded.lora_A), (exact.lora_B, rounded.lora_B)):
        weight.data = source.detach().double()
    shrink(exact, 2)
    shrink(rounded, 2)
    torch.testing.assert_close(added(rounded).double(), added(exact), atol=0.03, rtol=0.03)


def test_a_resized_layer_trains_on_with_the_same_optimizer():
    layer = one_layer()
    optimizer = optimizer_of(layer)
    for rank in (6, 2, 5):
        set_gradients([layer], seed=rank)
        optimizer.step()
        if rank > layer.r:
            generator = torch.Generator().manual_seed(0)
            growth = new_rows(layer, rank - layer.r, tokens=None, generator=generator)
            apply_change(layer, optimizer, grow_change(layer, rank), growth)
        else:
            change = shrink_change(layer, measure_strengths(layer, None), rank)
            apply_change(layer, optimizer, change)
        for weight in (layer.lora_A, layer.lora_B):
            state = optimizer.state[weight]
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape
