"""Cut a trained adapter to a parameter budget or to one rank, without training.

Data selects directions, not ranks: choosing ranks by outputs too changed predictions more
(`benchmarks/compress.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.layer import Components, Seen, find_components
from dynlora.adjuster import LayerBounds, grant_ranks
from dynlora.errors import AdapterError, BudgetError

FAINT = 1e-9  # weight of unseen inputs; it orders the directions that the texts do not use
TINY = 1e-300  # keeps 0 / 0 finite in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCut:
    """Effect of a cut on one layer."""

    name: str
    rank_before: int
    rank_after: int
    parameters: int  # after the cut
    energy_kept: float  # kept share of the layer's energy, in [0, 1]
    output_lost: float | None
    """Norm of the dropped part of the output, relative to the output's norm; None without data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """A cut adapter and the cost of the cut."""

    adapter: SavedAdapter
    layers: tuple[LayerCut, ...]
    budget: int  # maximum number of LoRA parameters
    parameters_before: int
    energy_kept: float  # share of all energy, in [0, 1]; with data, relative to each layer's output
    weighted: bool  # whether energies refer to outputs on data

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, without the adapter."""
        return {
            "budget": self.budget,
            "parameters_before": self.parameters_before,
            "parameters": self.adapter.parameters,
            "energy_kept": self.energy_kept,
            "weighted": self.weighted,
            "layers": [asdict(layer) for layer in self.layers],
        }


def compress(
    adapter: SavedAdapter, budget: int, seen: Mapping[str, Seen] | None = None
) -> Compressed:
    """Cut an adapter to at most `budget` LoRA parameters with the smallest loss of energy.

    `seen` has statistics per layer by name; None weights all inputs equally.
    """
    check_affordable(adapter, budget)
    blind = measure(adapter, None)
    ranks = plan_cut(blind, budget)
    parts = blind if seen is None else measure(adapter, seen)
    return cut_to(adapter, ranks, budget=budget, parts=parts, seen=seen)


def check_affordable(adapter: SavedAdapter, budget: int) -> None:
    """Raise `BudgetError` if a budget is not enough for one rank per layer."""
    low = sum(layer.parameters - layer.cost * (layer.r - 1) for layer in adapter.layers)
    if budget < low:
        share = math.ceil(100 * low / adapter.parameters)
        raise BudgetError(
            f"`--budget` must be enough for one rank in each of {len(adapter.layers)} layers, "
            f"{low} parameters ({share}%), but got {budget}. Use a budget in "
            f"[{low}, {adapter.parameters}]."
        )


def measure(adapter: SavedAdapter, seen: Mapping[str, Seen] | None) -> dict[str, Components]:
    """Return the components per layer, by name; on data if `seen` has statistics."""
    parts = {}
    for layer in adapter.layers:
        if seen is None:
            parts[layer.name] = find_components(layer)
            continue
        gram, white = seen[layer.name].gram, layer.A.double() @ layer.A.double().T
        # A small isotropic part stands for unseen inputs.
        gram = gram + FAINT * gram.trace() / white.trace().clamp(min=TINY) * white
        parts[layer.name] = find_components(layer, gram)
    return parts


def plan_cut(parts: Mapping[str, Components], budget: int) -> dict[str, int]:
    """Return the ranks per layer that keep the most energy within a budget.

    Each next rank goes to the component with the most energy (squared Frobenius norm) per
    parameter. No other ranks of the same cost keep more, except for the last one that does not fit.
    """
    bounds = {
        name: LayerBounds(
            cost=part.layer.cost, floor=1, ceiling=max(1, len(part.values)), held=part.layer.r
        )
        for name, part in parts.items()
    }
    energies = {name: part.energies for name, part in parts.items()}
    biases = sum(part.layer.parameters - part.layer.cost * part.layer.r for part in parts.values())

    def worth(name: str, rank: int) -> float:
        return energies[name][rank - 1] / bounds[name].cost

    return grant_ranks(bounds, budget=budget - biases, worth=worth)


def cut_to(
    adapter: SavedAdapter,
    ranks: Mapping[str, int],
    *,
    budget: int,
    parts: Mapping[str, Components],
    seen: Mapping[str, Seen] | None,
) -> Compressed:
    """Cut the layers to the given ranks."""
    layers, cuts, kept, total = [], [], 0.0, 0.0
    for layer in adapter.layers:
        part, rank = parts[layer.name], ranks[layer.name]
        # Keep the exact weights of a layer that loses nothing.
        made = layer if rank >= layer.r else part.cut(rank)
        # Avoid 0 / 0 for a layer whose output is zero.
        power = (seen[layer.name].output_power if seen else 1.0) or 1.0
        energy = math.fsum(part.energies[: made.r])
        kept += energy / power
        total += part.energy / power
        lost = math.sqrt(max(0.0, part.energy - energy) / power)
        layers.append(made)
        cuts.append(
            LayerCut(
                name=layer.name,
                rank_before=layer.r,
                rank_after=made.r,
                parameters=made.parameters,
                energy_kept=part.kept(made.r),
                output_lost=lost if seen else None,
            )
        )
    return Compressed(
        adapter=adapter.with_layers(layers),
        layers=tuple(cuts),
        budget=budget,
        parameters_before=adapter.parameters,
        weighted=seen is not None,
        energy_kept=kept / total if total else 1.0,
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
            f"{highest.name!r}, but got {rank}. Leave it out, or cut the layers with `--format "
            "svd-uniform`."
        )
    return adapter.with_layers([layer.at_rank(rank) for layer in adapter.layers])


def svd_uniform(adapter: SavedAdapter, rank: int) -> tuple[SavedAdapter, dict[str, float]]:
    """Cut every layer to its best update of rank `rank`, and rewrite the adapter like `uniform`.

    Also return the kept share of energy by layer, in ``[0, 1]``.
    """
    parts = {layer.name: find_components(layer) for layer in adapter.layers if layer.r > rank}
    cut = [parts[old.name].cut(rank) if old.name in parts else old for old in adapter.layers]
    kept = {layer.name: 1.0 for layer in adapter.layers}
    kept |= {name: part.kept(rank) for name, part in parts.items()}
    return uniform(adapter.with_layers(cut), rank), kept
