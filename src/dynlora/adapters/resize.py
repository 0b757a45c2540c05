"""Changes of rank: grow without changing the output, shrink with the least error, reorder.

Maps (`BasisChange`) are computed for many layers at once, and applied per layer.
"""

from collections.abc import Sequence
from itertools import compress

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from dynlora.adapters.factor import Factor
from dynlora.adapters.layers import LoraView
from dynlora.adapters.optimizer_state import rebase_state
from dynlora.adapters.strengths import Strengths
from dynlora.engines.deepspeed import AnyOptimizer, shape_of
from dynlora.engines.sharding import overwrite
from dynlora.small_matrices import batched
from dynlora.types import BasisChange


def shrink_changes(
    layers: Sequence[LoraView], strengths: Sequence[Strengths], ranks: Sequence[int]
) -> list[BasisChange]:
    """Return changes that keep each layer's strongest components, mixed as little as possible.

    If only untrained directions are dropped, the kept ones stay bit for bit equal.
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
    """Return maps that select every trained direction, and untrained ones up to `rank`."""
    kept = sorted(strengths.order[:rank])
    eye = torch.eye(len(strengths.order), dtype=torch.float64, device=strengths.values.device)
    return eye[kept], eye[:, kept]


def split_projectors(
    to_A: Float[Tensor, "layers rank r"], to_B: Float[Tensor, "layers r rank"]
) -> tuple[Float[Tensor, "layers rank r"], Float[Tensor, "layers r rank"]]:
    """Return balanced factors of the projectors ``to_B @ to_A``, close to selections of rows.

    The product determines its factors up to an invertible matrix. The balanced split of its SVD,
    ``sqrt(S) V^T`` and ``U sqrt(S)``, is a pure rotation where the projector is orthogonal, which
    preserves gradients, steps and moments in the kept space. The remaining rotation brings the kept
    rows closest to the old rows that contribute most, because Adam's moments belong to rows.
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
    """Return the change that orders a layer's components by strength and drops none."""
    return BasisChange(name=layer.name, to_A=strengths.to_A, to_B=strengths.to_B)


def grow_change(layer: LoraView, rank: int) -> BasisChange:
    """Return the change that keeps every direction and adds ``rank - r`` zero ones."""
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
    """Apply a change to a layer's weights, optimizer state and fields.

    `rows` become the last rows of `lora_A`.
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
    """Give a layer zero tensors of another rank, for a checkpoint to fill."""
    size = layer.capacity or rank
    if rank != layer.r or layer.factor_A.size != size:
        _set_matrix(layer.factor_A, torch.zeros(rank, layer.in_features), size)
        _set_matrix(layer.factor_B, torch.zeros(layer.out_features, rank), size)
        layer.set_fields(r=rank, scaling=layer.scaling)


@torch.no_grad()
def hold_at(layer: LoraView, rank: int) -> None:
    """Pad a layer's tensors permanently to a rank, with zeros behind the live components.

    No mask is needed: a component with zeros in both factors adds nothing and gets no gradient.
    """
    for factor in layer.factors:
        if factor.size != rank:
            set_data(factor.parameter, factor.padded(factor.matrix(layer.r), rank))
    layer.set_capacity(rank)
    layer.set_fields(r=layer.r, scaling=layer.scaling)


def _set_matrix(factor: Factor, matrix: Tensor, size: int) -> None:
    parameter = factor.parameter
    data = factor.padded(matrix.to(parameter.device), size)
    if data.shape == shape_of(parameter):
        # In place, because engines and compiled code refer to the tensor's memory.
        overwrite(parameter, data)
    else:
        set_data(parameter, data.to(parameter.dtype))


def set_data(parameter: Parameter, data: Tensor) -> None:
    """Replace a parameter's data by a tensor of another shape.

    A referenced backward graph (a loop that keeps `loss`) retains the parameter's gradient
    accumulator, which expects the old shape: the next backward pass would raise. torch drops the
    accumulator when the dtype of `.data` changes, so the data passes through another dtype.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data.contiguous()
