"""Changes of rank: grow in new directions of the input, shrink with the least error, reorder."""

from collections.abc import Iterable, Sequence
from itertools import compress, islice

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dynlora.adapters.factor import Factor
from dynlora.adapters.layers import LoraView
from dynlora.adapters.optimizer_state import rebase_state
from dynlora.adapters.strengths import Strengths
from dynlora.engines.deepspeed import AnyOptimizer
from dynlora.engines.sharding import write
from dynlora.small_matrices import batched, smaller_gram
from dynlora.types import BasisChange, Tokens

MAX_NEW_NORM = 10.0
"""Largest norm of a new row of `lora_A`, relative to existing rows."""

FLOOR = 1e-6
"""Smallest spread of an observed direction, relative to the norm of the centred input."""


def shrink_changes(
    layers: Sequence[LoraView], strengths: Sequence[Sequence[Strengths]], ranks: Sequence[int]
) -> list[BasisChange]:
    """Return changes that keep each expert's strongest components, mixed as little as possible.

    If only untrained directions are dropped, the kept ones stay bit for bit equal.
    """
    wanted = [(found, k) for each, k in zip(strengths, ranks, strict=True) for found in each]
    mixes = [rank < found.trained for found, rank in wanted]
    mixed = list(compress(wanted, mixes))
    split = iter(
        batched(
            split_projectors,
            [found.to_A[:rank] for found, rank in mixed],
            [found.to_B[:, :rank] for found, rank in mixed],
        )
    )
    maps = (
        next(split) if mixing else _selection(found, rank)
        for (found, rank), mixing in zip(wanted, mixes, strict=True)
    )
    return [_joined(layer, islice(maps, layer.experts)) for layer in layers]


def _joined(layer: LoraView, maps: Iterable[tuple[Tensor, ...]]) -> BasisChange:
    """Return one change of the layer from the maps of each expert."""
    to_A, to_B = (torch.stack(side).squeeze(0) for side in zip(*maps, strict=True))
    return BasisChange(name=layer.name, to_A=to_A, to_B=to_B)


def _selection(strengths: Strengths, rank: int) -> tuple[Tensor, Tensor]:
    """Return maps that select the trained directions, and untrained ones up to `rank`."""
    kept = sorted(strengths.order[:rank])
    eye = torch.eye(len(strengths.order), dtype=torch.float64, device=strengths.values.device)
    return eye[kept], eye[:, kept]


def split_projectors(
    to_A: Float[Tensor, "layers rank r"], to_B: Float[Tensor, "layers r rank"]
) -> tuple[Float[Tensor, "layers rank r"], Float[Tensor, "layers r rank"]]:
    """Return balanced factors of the projectors ``to_B @ to_A``, close to selections of rows.

    The balanced split of the SVD, ``sqrt(S) V^T`` and ``U sqrt(S)``, is a pure rotation where the
    projector is orthogonal, which preserves gradients, steps and moments in the kept space. A
    further rotation, which keeps the product, brings the kept rows closest to the old rows that
    contribute most, because Adam's moments belong to rows.
    """
    rank = to_A.shape[1]
    U, S, Vh = torch.linalg.svd(to_B @ to_A)
    roots = S[:, :rank].sqrt()
    to_A, to_B = roots[:, :, None] * Vh[:, :rank], U[:, :, :rank] * roots[:, None]
    nearest = to_A.norm(dim=1).topk(rank).indices.sort().values
    left, _, right = torch.linalg.svd(to_A.take_along_dim(nearest[:, None], dim=2))
    rotation = left @ right
    return rotation.mT @ to_A, to_B @ rotation


def reorder_change(layer: LoraView, strengths: Sequence[Strengths]) -> BasisChange:
    """Return the change that orders a layer's components by strength and drops none."""
    return _joined(layer, [(found.to_A, found.to_B) for found in strengths])


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
    rows: Float[Tensor, "*experts grown in_features"] | None = None,
) -> None:
    """Apply a change to weights, optimizer state and fields; `rows` become the last of `lora_A`."""
    A = change.to_A @ layer.lora_A.double()
    B = layer.lora_B.double() @ change.to_B
    if rows is not None:
        A[..., A.shape[-2] - rows.shape[-2] :, :] = rows
    bias = None if change.scale_ratio == 1 else layer.bias
    set_matrix(layer.factor_A, A)
    set_matrix(layer.factor_B, B)
    if bias is not None:
        set_matrix(bias, bias.matrix / change.scale_ratio)
    # After the parameters, because bitsandbytes chooses a precision by their size.
    rebase_state(optimizer, change, lora_A=layer.factor_A, lora_B=layer.factor_B, bias=bias)
    layer.set_fields(r=A.shape[-2], scaling=layer.scaling * change.scale_ratio)


def set_rank(layer: LoraView, rank: int) -> None:
    """Give a layer zero tensors of another rank, for a checkpoint to fill."""
    if rank != layer.r:
        experts = layer.lora_A.shape[:-2]
        set_matrix(layer.factor_A, torch.zeros(*experts, rank, layer.in_features))
        set_matrix(layer.factor_B, torch.zeros(*experts, layer.out_features, rank))
        layer.set_fields(r=rank, scaling=layer.scaling)


def set_matrix(factor: Factor, matrix: Tensor) -> None:
    """Overwrite a factor without its optimizer state; the rank may differ."""
    write(factor.parameter, factor.from_matrix(matrix.to(factor.parameter.device)))


@torch.no_grad()
def new_rows(
    layers: Sequence[LoraView],
    counts: Sequence[int],
    tokens: Sequence[Tokens | None],
    *,
    generator: Generator,
) -> list[Float[Tensor, "*experts grown in_features"]]:
    """Return new rows of `lora_A`: principal directions of the input that old rows do not cover.

    Directions are random where the tokens show too few; None and ids show none. A new row's mean
    squared input equals the mean over existing rows, so that its column of `lora_B` gets gradients
    of the usual size. Its norm is at most `MAX_NEW_NORM` times theirs: directions of little
    variance would need more.
    """
    held = [layer.lora_A.double() for layer in layers]
    seen = [None if t is None or not t.is_floating_point() else t for t in tokens]
    shown = _uncovered_directions(held, seen, counts)
    return [
        _scaled(A, _filled_up(rows, count, generator), inputs)
        for A, rows, count, inputs in zip(held, shown, counts, seen, strict=True)
    ]


def _uncovered_directions(
    held: Sequence[Tensor], seen: Sequence[Tensor | None], counts: Sequence[int]
) -> list[Tensor]:
    """Return at most `count` unit directions per layer that its rows do not cover."""
    covered = batched(torch.linalg.qr, [A.mT for A in held])
    places, residuals, floors = [], [], []
    for place, (A, (Q, _), inputs) in enumerate(zip(held, covered, seen, strict=True)):
        if inputs is not None:
            centred = (inputs - inputs.mean(dim=0)).to(A)
            places.append(place)
            residuals.append(centred - centred @ Q @ Q.T)
            floors.append(FLOOR * centred.norm())
    wanted = [counts[place] for place in places]
    found = dict(zip(places, principal_directions(residuals, wanted, floors=floors), strict=True))
    return [found.get(place, A[..., :0, :]) for place, A in enumerate(held)]


def principal_directions(
    inputs: Sequence[Float[Tensor, "_ _"]],
    counts: Sequence[int],
    *,
    floors: Sequence[Float[Tensor, ""]],
) -> list[Float[Tensor, "_ _"]]:
    """Return the unit directions of each input's largest spread, at most `count` above `floor`.

    The smaller Gram matrix costs a third of an SVD, and in float64 resolves spreads (roots of sums
    of squares) down to 1e-7 of the largest. The largest element of each direction is positive.
    """
    if not inputs:
        return []
    spreads, bases = [], []
    spectra = batched(torch.linalg.eigh, [smaller_gram(vectors) for vectors in inputs])
    for (squares, vectors), count in zip(spectra, counts, strict=True):
        spreads.append(squares.flip(0)[:count].clamp(min=0).sqrt())
        bases.append(vectors.flip(1)[:, :count].T)
    enough = [(s > floor).sum() for s, floor in zip(spreads, floors, strict=True)]
    found = []
    for vectors, spread, basis, k in zip(
        inputs, spreads, bases, torch.stack(enough).tolist(), strict=True
    ):
        wide = len(vectors) < vectors.shape[1]
        rows = basis[:k] @ vectors / spread[:k, None] if wide else basis[:k]
        found.append(rows * rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign())
    return found


def _filled_up(rows: Tensor, count: int, generator: Generator) -> Tensor:
    """Return `count` unit directions: the given rows, then random ones."""
    *experts, given, width = rows.shape
    shape = *experts, count - given, width
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(rows)
    return torch.cat([rows, noise / noise.norm(dim=-1, keepdim=True)], dim=-2)


def _scaled(A: Tensor, rows: Tensor, inputs: Tensor | None) -> Tensor:
    usual, own = _input_power(A, inputs).mean(dim=-1, keepdim=True), _input_power(rows, inputs)
    norm = A.square().sum(dim=-1).mean(dim=-1, keepdim=True).sqrt()
    lengths = torch.where(own > 0, (usual / own).sqrt(), norm).clamp(max=MAX_NEW_NORM * norm)
    return rows * lengths[..., None]


def _input_power(rows: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the mean squared input along each row; on unit-covariance input without tokens."""
    if tokens is None:
        return rows.square().sum(dim=-1)
    return (tokens.to(rows) @ rows.T).square().mean(dim=0)
