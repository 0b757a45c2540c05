"""Compare two adapters layer by layer, from their factors alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dynlora.adapter_files.adapter import SavedAdapter, match_layers
from dynlora.adapter_files.layer import Components, SavedLayer, find_components


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDiff:
    """One layer of two adapters, or all layers; a pair has 0 for an adapter without the layer."""

    name: str
    rank: tuple[int, ...]
    parameters: tuple[int, ...]
    norm: tuple[float, ...]  # Frobenius norms of the updates
    cosine: float | None  # of the two updates, in [-1, 1]; None if one of them is zero
    inside: float | None
    """Share of the second update's energy in the output directions of the first, in [0, 1]; None
    if the second update is zero."""


def diff(first: SavedAdapter, second: SavedAdapter) -> tuple[list[LayerDiff], LayerDiff]:
    """Compare the updates of two adapters per layer, and over all layers together.

    Raises `AdapterError` if the shapes of a layer differ.
    """
    names, read = match_layers((first, second))
    layers = [_diff_layer(name, read(name)) for name in names]
    return layers, _total(layers)


def _diff_layer(name: str, pair: Sequence[SavedLayer | None]) -> LayerDiff:
    parts = [None if layer is None else find_components(layer) for layer in pair]
    norm = tuple(0.0 if part is None else math.sqrt(part.energy) for part in parts)
    one, other = parts
    cosine, inside = None, 0.0 if norm[1] else None
    if one and other and all(norm):
        (U, V), (W, X) = _directions(one), _directions(other)
        overlap = U.T @ W
        signs = math.copysign(1, one.layer.scaling) * math.copysign(1, other.layer.scaling)
        cosine = signs * float(one.values @ (overlap * (V @ X.T)) @ other.values) / math.prod(norm)
        inside = float(overlap.square().sum(0) @ other.values.square()) / other.energy
    return LayerDiff(
        name=name,
        rank=tuple(layer.r if layer else 0 for layer in pair),
        parameters=tuple(layer.parameters if layer else 0 for layer in pair),
        norm=norm,
        cosine=cosine,
        inside=inside,
    )


def _directions(part: Components) -> tuple[Tensor, Tensor]:
    """Return singular vectors of an update: outputs in columns (out, k), inputs in rows (k, in)."""
    A, B = part.A, part.B
    return B / B.norm(dim=0), A / A.norm(dim=1, keepdim=True)


def _total(layers: Sequence[LayerDiff]) -> LayerDiff:
    first, second = (
        math.hypot(*norms) for norms in zip(*(each.norm for each in layers), strict=True)
    )
    product = math.fsum((each.cosine or 0.0) * math.prod(each.norm) for each in layers)
    inside = math.fsum((each.inside or 0.0) * each.norm[1] ** 2 for each in layers)
    return LayerDiff(
        name=f"{len(layers)} layers",
        rank=tuple(map(sum, zip(*(each.rank for each in layers), strict=True))),
        parameters=tuple(map(sum, zip(*(each.parameters for each in layers), strict=True))),
        norm=(first, second),
        cosine=product / (first * second) if first and second else None,
        inside=inside / second**2 if second else None,
    )
