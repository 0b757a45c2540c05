"""Change of rank: grow without changing the function, shrink losing the least, reorder.

A change is a pair of r x r maps (`BasisChange`), found for all layers at once and then made layer
by layer: weights, optimizer state and fields together.
"""

from collections.abc import Sequence
from itertools import compress

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from dynlora.adapters.deepspeed import AnyOptimizer
from dynlora.adapters.factor import Factor
from dynlora.adapters.layers import LoraView
from dynlora.adapters.optimizer_state import rebase_state
from dynlora.adapters.sharding import overwrite, shape_of
from dynlora.adapters.strengths import Strengths
from dynlora.small_matrices import batched
from dynlora.types import BasisChange


def shrink_changes(
    layers: Sequence[LoraView], strengths: Sequence[Strengths], ranks: Sequence[int]
) -> list[BasisChange]:
    """Return the changes that keep each layer's strongest components, closest to no change.

    Where only untrained directions go, those kept stay bit for bit as they are.

    Args:
        layers: The layers that shrink.
        strengths: Their components.
        ranks: How many of them each keeps.
    """
    mixes = [rank < found.trained for found, rank in zip(strengths, ranks, strict=True)]
    mixed = list(compress(zip(strengths, ranks, strict=True), mixes))
    split = iter(
        batched(
            split_projectors,
            [found.to_A[:rank] for found, rank in mixed],
            [found.to_B[:, :rank] for found, rank in mixed],
        )
    )
    changes = []
    for layer, found, rank, mixing in zip(layers, strengths, ranks, mixes, strict=True):
        to_A, to_B = next(split) if mixing else _selection(found, rank)
        changes.append(BasisChange(name=layer.name, to_A=to_A, to_B=to_B))
    return changes


def _selection(strengths: Strengths, rank: int) -> tuple[Tensor, Tensor]:
    """Return the maps that keep every trained direction, and untrained ones up to a rank."""
    kept = sorted(strengths.order[:rank])
    eye = torch.eye(len(strengths.order), dtype=torch.float64, device=strengths.values.device)
    return eye[kept], eye[:, kept]


def split_projectors(
    to_A: Float[Tensor, "layers rank r"], to_B: Float[Tensor, "layers r rank"]
) -> tuple[Float[Tensor, "layers rank r"], Float[Tensor, "layers r rank"]]:
    """Return other factors of the projectors ``to_B @ to_A``, as close to selections as can be.

    The product fixes the factors up to an invertible matrix. The balanced split, ``sqrt(S) V^T``
    and ``U sqrt(S)`` of its SVD, is a pure rotation wherever the projector is orthogonal, so that
    gradients, steps and moments in the kept space stay what they were. The rotation left free
    brings the kept rows closest to the old rows that take most part in them, because Adam's
    moments belong to single rows.

    Args:
        to_A: Factors on the right of the products.
        to_B: Factors on their left.
    """
    rank = to_A.shape[1]
    U, S, Vh = torch.linalg.svd(to_B @ to_A)
    roots = S[:, :rank].sqrt()
    to_A, to_B = roots[:, :, None] * Vh[:, :rank], U[:, :, :rank] * roots[:, None]
    nearest = to_A.norm(dim=1).topk(rank).indices.sort().values
    left, _, right = torch.linalg.svd(to_A.take_along_dim(nearest[:, None], dim=2))
    rotation = left @ right
    return rotation.mT @ to_A, to_B @ rotation


def reorder_change(layer: LoraView, strengths: Strengths) -> BasisChange:
    """Return the change that orders a layer's components by strength, dropping none."""
    return BasisChange(name=layer.name, to_A=strengths.to_A, to_B=strengths.to_B)


def grow_change(layer: LoraView, rank: int) -> BasisChange:
    """Return the change that keeps every direction and adds ``rank - r`` empty ones."""
    eye = torch.eye(rank, layer.r, dtype=torch.float64, device=layer.lora_A.device)
    return BasisChange(name=layer.name, to_A=eye, to_B=eye.T)


def scale_change(layer: LoraView, ratio: float) -> BasisChange:
    """Return the change that multiplies `scaling` by `ratio` and divides `lora_B` by it."""
    eye = torch.eye(layer.r, dtype=torch.float64, device=layer.lora_A.device)
    return BasisChange(name=layer.name, to_A=eye, to_B=eye / ratio, scale_ratio=ratio)


@torch.no_grad()
def apply_change(
    layer: LoraView,
    optimizer: AnyOptimizer,
    change: BasisChange,
    rows: Float[Tensor, "grown in_features"] | None = None,
) -> None:
    """Change a layer's weights, its optimizer state and its fields together.

    Args:
        layer: The layer to change.
        optimizer: Holds the layer's parameters.
        change: The maps.
        rows: Values for the rows of `lora_A` that `change` grows, its last ones.
    """
    A = change.to_A @ layer.lora_A.double()
    B = layer.lora_B.double() @ change.to_B
    if rows is not None:
        A[len(A) - len(rows) :] = rows
    size = layer.capacity or len(A)
    rebase_state(optimizer, change, lora_A=layer.factor_A, lora_B=layer.factor_B, size=size)
    _set_matrix(layer.factor_A, A, size)
    _set_matrix(layer.factor_B, B, size)
    layer.set_fields(r=len(A), scaling=layer.scaling * change.scale_ratio)


def set_rank(layer: LoraView, rank: int) -> None:
    """Give a layer tensors of that rank, to be filled by a checkpoint; their content is zero."""
    size = layer.capacity or rank
    if rank != layer.r or layer.factor_A.size != size:
        _set_matrix(layer.factor_A, torch.zeros(rank, layer.in_features), size)
        _set_matrix(layer.factor_B, torch.zeros(layer.out_features, rank), size)
        layer.set_fields(r=rank, scaling=layer.scaling)


@torch.no_grad()
def hold_at(layer: LoraView, rank: int) -> None:
    """Give a layer tensors of that rank for good, the live components first and zeros behind.

    Components whose row of `lora_A` and column of `lora_B` are both zero add nothing and get no
    gradient, so that no mask is needed.
    """
    for factor, matrix in ((layer.factor_A, layer.lora_A), (layer.factor_B, layer.lora_B)):
        if factor.size != rank:
            set_data(factor.parameter, factor.padded(matrix, rank))
    layer.set_capacity(rank)
    layer.set_fields(r=layer.r, scaling=layer.scaling)


def _set_matrix(factor: Factor, matrix: Tensor, size: int) -> None:
    parameter = factor.parameter
    data = factor.padded(matrix.to(parameter.device), size)
    if data.shape == shape_of(parameter):
        # In place: engines and compiled code know the tensor, not the parameter, by its memory.
        overwrite(parameter, data)
    else:
        set_data(parameter, data.to(parameter.dtype))


def set_data(parameter: Parameter, data: Tensor) -> None:
    """Put a tensor of another shape into a parameter that stays the same object.

    A backward graph that is still referenced (a loop that keeps `loss`) holds the parameter's
    gradient accumulator, which remembers the old shape; the next backward would raise. torch
    forgets the accumulator when the dtype of `.data` changes, so the data passes through another.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data.contiguous()
