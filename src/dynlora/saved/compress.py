"""A finished adapter cut to a budget of parameters, without training.

The spectrum of every layer is known, so ranks need no estimate: they are granted one at a time to
the layer whose next component carries the most energy per parameter (`adjuster.grant_ranks`), the
squared Frobenius norm. Energies fall within a layer, so no other ranks of that cost keep more, up
to the last rank that does not fit.

Data does not change the ranks but which directions a layer keeps: those that add the most to its
output on what it saw. That order was measured (`benchmarks/compress.py`): to let outputs decide on
ranks too, relative to their own norm or not, changes predictions more.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dynlora.adjuster import LayerBounds, grant_ranks
from dynlora.errors import BudgetError
from dynlora.saved.activations import Seen
from dynlora.saved.adapter import SavedAdapter
from dynlora.saved.layer import SavedLayer
from dynlora.saved.spectrum import Components, find_components

FAINT = 1e-9
"""Weight of unseen inputs: what few texts did not touch goes first, but is not lost for free."""
TINY = 1e-300
"""Keeps a quotient of zeros finite in float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCut:
    """What a cut did to one layer."""

    name: str
    rank_before: int
    rank_after: int
    parameters: int
    """After the cut."""
    energy_kept: float
    """Part of the layer's energy, in ``[0, 1]``."""
    output_lost: float | None
    """Norm of the part dropped, relative to the layer's output norm; None without data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """A cut adapter, and what the cut cost."""

    adapter: SavedAdapter
    layers: tuple[LayerCut, ...]
    budget: int
    """Parameters that it may have."""
    parameters_before: int
    energy_kept: float
    """Part of all layers' energy, in ``[0, 1]``; with data, each layer's relative to its output."""
    weighted: bool
    """Whether energies are those of outputs on data that was seen."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; not the adapter itself."""
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
    """Cut an adapter to at most `budget` parameters, losing the least.

    Args:
        adapter: As read.
        budget: Parameters that its LoRA layers may have together.
        seen: What each layer saw, by name; None weighs all inputs alike.

    Raises:
        BudgetError: If one rank a layer already costs more, or `budget` is below 1.
    """
    check_affordable(adapter, budget)
    blind = measure(adapter, None)
    ranks = plan_cut(blind, budget)
    parts = blind if seen is None else measure(adapter, seen)
    return cut_to(adapter, ranks, budget=budget, parts=parts, seen=seen)


def measure(adapter: SavedAdapter, seen: Mapping[str, Seen] | None) -> dict[str, Components]:
    """Return every layer's components, by name."""
    if seen is None:
        return {layer.name: find_components(layer) for layer in adapter.layers}
    return {
        layer.name: find_components(layer, _with_unseen(layer, seen[layer.name].gram))
        for layer in adapter.layers
    }


def _with_unseen(layer: SavedLayer, gram: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    """Return a moment in which inputs that were not seen count, too, but faintly."""
    white = layer.A.double() @ layer.A.double().T
    return gram + FAINT * gram.trace() / white.trace().clamp(min=TINY) * white


def plan_cut(parts: Mapping[str, Components], budget: int) -> dict[str, int]:
    """Return the ranks that keep the most energy within a budget, by name."""
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
    """Return the adapter with its layers cut to the given ranks."""
    layers, cuts, kept, total = [], [], 0.0, 0.0
    for layer in adapter.layers:
        part, rank = parts[layer.name], ranks[layer.name]
        # A layer that loses nothing stays as it is, bit for bit.
        made = layer if rank >= layer.r else part.cut(rank)
        # An output that is zero everywhere loses nothing, relative to whatever.
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


def check_affordable(adapter: SavedAdapter, budget: int) -> None:
    """Check that a budget pays one rank in every layer.

    Raises:
        BudgetError: If it does not.
    """
    low = sum(layer.parameters - layer.cost * (layer.r - 1) for layer in adapter.layers)
    if budget < low:
        share = 100 * low / adapter.parameters
        raise BudgetError(
            f"`--budget` must pay one rank in each of {len(adapter.layers)} layers, which takes "
            f"{low} parameters ({math.ceil(share)}%), got {budget}: use a budget in "
            f"[{low}, {adapter.parameters}]."
        )
