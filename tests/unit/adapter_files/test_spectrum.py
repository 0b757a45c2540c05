"""Components of a saved layer: a dense SVD of the full update is the oracle."""

import math

import pytest
import torch

from dynlora.adapter_files.layer import SavedLayer, find_components

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def make_layer(*, r=6, inputs=20, outputs=12, scaling=1.5, use_rslora=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    divisor = math.sqrt(r) if use_rslora else r
    return SavedLayer(
        name="model.q_proj",
        key_A="A",
        key_B="B",
        lora_A=torch.randn(r, inputs, generator=generator),
        lora_B=torch.randn(outputs, r, generator=generator),
        lora_alpha=scaling * divisor,
        use_rslora=use_rslora,
    )


def dense(layer):
    return layer.scaling * layer.B.double() @ layer.A.double()


def best(update, rank):
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@pytest.mark.parametrize(
    ("rank", "use_rslora", "scaling"),
    [(1, False, 1.5), (2, True, -0.25), (6, True, 1.5), (9, False, 1.5)],
)
def test_a_cut_is_the_best_update_of_its_rank(rank, use_rslora, scaling):
    layer = make_layer(use_rslora=use_rslora, scaling=scaling)
    parts = find_components(layer)
    torch.testing.assert_close(parts.values, torch.linalg.svdvals(dense(layer))[:6], **TOLERANCE)
    cut = parts.cut(rank)
    assert cut.r == min(rank, 6)
    torch.testing.assert_close(dense(cut), best(dense(layer), rank), **TOLERANCE)
    if rank < 6:  # balanced, so that half precision can represent both factors
        torch.testing.assert_close(cut.A.norm(dim=1), cut.B.norm(dim=0))


def test_no_more_ranks_are_kept_than_the_update_has_directions():
    assert len(find_components(make_layer(r=6, outputs=4)).values) == 4
    twin = make_layer(r=6)
    twin.lora_B[:, 3:] = twin.lora_B[:, :3]
    parts = find_components(twin)
    assert len(parts.values) == 3
    torch.testing.assert_close(dense(parts.cut(6)), dense(twin), **TOLERANCE)


@pytest.mark.parametrize(("scaling", "trained"), [(1.5, False), (0.0, True), (1e-308, True)])
def test_a_layer_without_energy_keeps_a_row_that_can_be_trained(scaling, trained):
    layer = make_layer(scaling=scaling)
    layer.lora_B.mul_(trained)
    parts = find_components(layer)
    assert (parts.energies, parts.energy, parts.effective_rank, parts.kept(1)) == ([], 0, 0, 1)
    cut = parts.cut(4)
    assert torch.equal(cut.A, layer.A[:1])
    assert not cut.B.any()


def test_the_effective_rank_counts_equal_directions():
    layer = make_layer(r=5, inputs=5, outputs=5)
    layer.lora_A[:] = torch.eye(5)
    layer.lora_B[:] = torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0]))
    parts = find_components(layer)
    assert parts.effective_rank == pytest.approx(3)
    assert parts.kept(1) == pytest.approx(1 / 3)
