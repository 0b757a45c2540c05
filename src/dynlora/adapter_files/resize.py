"""Give a trained adapter's layers other ranks, without training, layer by layer.

`benchmarks/adapters/resize.py` compares rules for ranks and directions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.layer import Components, SavedLayer, Seen, find_components
from dynlora.adapter_files.writer import write_adapter
from dynlora.adjuster import LayerBounds, grant_ranks
from dynlora.errors import AdapterError, BudgetError

SEED = 0  # of new rows of `lora_A`
Views = Mapping[str, Seen] | None  # statistics on data by layer; None weights all inputs equally


@dataclass(frozen=True, kw_only=True, slots=True)
class ResizedLayer:
    """Effect of a new rank on one layer."""

    name: str
    rank_before: int
    rank_after: int
    parameters: int  # after the change
    energy: float  # before the change; with data, relative to the mean square of the output
    energy_kept: float  # kept share of the energy, in [0, 1]
    output_lost: float | None
    """Norm of the dropped part of the output, relative to the output's norm; None without data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resized:
    """Effect of new ranks on an adapter."""

    layers: tuple[ResizedLayer, ...]
    parameters_before: int
    parameters: int
    energy_kept: float  # share of all energy, in [0, 1]; with data, relative to each layer's output
    weighted: bool  # whether energies refer to outputs on data

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


def resize(
    adapter: SavedAdapter, ranks: Mapping[str, int], output: Path, seen: Views = None
) -> Resized:
    """Write an adapter with other ranks per layer to a new folder, one layer in memory at a time.

    A layer that shrinks keeps its directions of most energy: of the update, or of the output on
    data if `seen` has statistics. A layer that grows keeps its function and gets new directions
    that can be trained. Other layers stay bit for bit equal. No layer's scaling changes.

    `ranks` come from `plan_rank`, `plan_budget` or `plan_error`, `seen` from `observe_texts`.
    Raises `AdapterError` if `output` exists, or a new weight is not finite.
    """
    outlines = [
        layer if ranks[layer.name] == layer.r else layer.outline(ranks[layer.name])
        for layer in adapter.layers
    ]
    made = adapter.with_layers(outlines)
    generator = torch.Generator().manual_seed(SEED)
    changes: list[ResizedLayer] = []

    def resized() -> Iterator[SavedLayer]:
        for before, after in zip(adapter.layers, outlines, strict=True):
            part = measure(before, seen)
            changes.append(_change(part, after, seen))
            cut = part.cut(after.r) if after.r < before.r else before
            full = cut if cut.r == after.r else cut.grow(after.r, generator)
            yield replace(full, lora_alpha=after.lora_alpha)  # as in the file's header

    write_adapter(made, output, resized())
    total = math.fsum(change.energy for change in changes)
    kept = math.fsum(change.energy * change.energy_kept for change in changes)
    return Resized(
        layers=tuple(changes),
        parameters_before=adapter.parameters,
        parameters=made.parameters,
        energy_kept=kept / total if total else 1.0,
        weighted=seen is not None,
    )


def _change(part: Components, after: SavedLayer, seen: Views) -> ResizedLayer:
    energy = part.energy / _power(after.name, seen)
    kept = part.kept(after.r)
    return ResizedLayer(
        name=after.name,
        rank_before=part.layer.r,
        rank_after=after.r,
        parameters=after.parameters,
        energy=energy,
        energy_kept=kept,
        output_lost=math.sqrt(max(0.0, energy * (1 - kept))) if seen else None,
    )


def _power(name: str, seen: Views) -> float:
    """Return the mean square of a layer's output; 1 without data, or if it is zero."""
    return (seen[name].output_power if seen else 1.0) or 1.0


def measure(layer: SavedLayer, seen: Views = None) -> Components:
    """Return a layer's components; of its output on data if `seen` has statistics."""
    return find_components(layer, None if seen is None else seen[layer.name].gram)


def plan_rank(adapter: SavedAdapter, rank: int) -> dict[str, int]:
    """Return one rank for all layers; raise `AdapterError` if no layer has so many directions."""
    widest = max(min(layer.inputs, layer.outputs) for layer in adapter.layers)
    if rank > widest:
        raise AdapterError(
            f"`--rank` must be at most {widest}, the smaller width of the widest layer, but got "
            f"{rank}. Use a lower rank."
        )
    return {layer.name: rank for layer in adapter.layers}


def plan_error(adapter: SavedAdapter, error: float, seen: Views = None) -> dict[str, int]:
    """Return the lowest ranks whose relative error is at most `error` in every layer.

    The error is the norm of the dropped part of the layer's output, relative to the output's norm;
    without `seen`, the Frobenius norm of the dropped part of the update, relative to the update's.
    """
    ranks = {}
    for layer in adapter.layers:
        energies = measure(layer, seen).energies
        left = error**2 * (seen[layer.name].output_power if seen else math.fsum(energies))
        ranks[layer.name] = lowest_rank(energies, left)
    return ranks


def lowest_rank(energies: Sequence[float], left: float) -> int:
    """Return the lowest rank of at least 1 that drops at most the energy `left`."""
    rank = len(energies)
    while rank > 1 and energies[rank - 1] <= left:
        rank -= 1
        left -= energies[rank]
    return max(1, rank)


def plan_budget(adapter: SavedAdapter, budget: int, seen: Views = None) -> dict[str, int]:
    """Return the ranks per layer that keep the most energy within a budget of LoRA parameters.

    Each next rank goes to the component with the most energy per parameter: of the update (squared
    Frobenius norm), or of the output on data, divided by the output's root mean square. No other
    ranks of the same cost keep more, except for the last one that does not fit.
    With a budget above the adapter's parameters, all layers grow by about the same number of ranks.

    Raises `BudgetError` if the budget is not enough for one rank per layer.
    """
    check_affordable(adapter, budget)
    grows = budget > adapter.parameters
    biases = adapter.parameters - sum(layer.cost * layer.r for layer in adapter.layers)
    bounds: dict[str, LayerBounds] = {}
    energies: dict[str, list[float]] = {}
    for layer in adapter.layers:
        floor, ceiling = layer.r, min(layer.inputs, layer.outputs)
        if not grows:
            energies[layer.name] = measure(layer, seen).energies
            floor, ceiling = 1, len(energies[layer.name])
        bounds[layer.name] = LayerBounds(
            cost=layer.cost, floor=floor, ceiling=max(floor, ceiling), held=layer.r
        )

    def worth(name: str, rank: int) -> float:
        if grows:
            return bounds[name].held - rank
        norm = math.sqrt(_power(name, seen))
        return energies[name][rank - 1] / norm / bounds[name].cost

    return grant_ranks(bounds, budget=budget - biases, worth=worth)


def check_affordable(adapter: SavedAdapter, budget: int) -> None:
    """Raise `BudgetError` if a budget is not enough for one rank per layer."""
    low = sum(layer.parameters - layer.cost * (layer.r - 1) for layer in adapter.layers)
    if budget < low:
        share = math.ceil(100 * low / adapter.parameters)
        raise BudgetError(
            f"`--budget` must be enough for one rank in each of {len(adapter.layers)} layers, "
            f"{low} parameters ({share}%), but got {budget}. Use a budget of at least {low}."
        )


def uniform(adapter: SavedAdapter, rank: int | None = None) -> SavedAdapter:
    """Return the adapter with one rank and a scaling of 1 in every layer; its function is the same.

    Engines with a single rank and `lora_alpha` need this. None uses the highest rank of any layer.
    """
    highest = max(adapter.layers, key=lambda layer: layer.r)
    rank = highest.r if rank is None else rank
    if rank < highest.r:
        raise AdapterError(
            f"`--rank` must be at least the highest rank, which is {highest.r} in layer "
            f"{highest.name!r}, but got {rank}. Leave it out, or cut the layers with `resize`."
        )
    return adapter.with_layers([layer.at_rank(rank) for layer in adapter.layers])
