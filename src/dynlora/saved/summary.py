"""What a saved adapter spends and where: the figures behind `dynlora inspect`."""

from dataclasses import asdict, dataclass
from typing import Any

from dynlora.saved.adapter import SavedAdapter
from dynlora.saved.spectrum import find_components


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """One layer."""

    name: str
    rank: int
    inputs: int
    outputs: int
    parameters: int
    share: float
    """Part of all LoRA parameters, in ``[0, 1]``."""
    norm: float
    """Frobenius norm of the update, scaling included."""
    energy_share: float
    """Part of the sum of all layers' squared norms, in ``[0, 1]``; 0 of an untrained adapter."""
    kept_by_half: float
    """Part of the layer's squared norm that its strongest directions hold, half of its rank
    rounded up."""
    effective_rank: float
    """Directions that the squared norm is spread over, in ``[1, rank]``; 0 of a zero update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSummary:
    """All layers."""

    base_model: str
    """As the adapter names it; empty where it does not."""
    layers: tuple[LayerSummary, ...]
    parameters: int
    """Of the LoRA layers."""
    other_parameters: int
    """Of everything else in the file, such as a classifier."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


def summarise(adapter: SavedAdapter) -> AdapterSummary:
    """Return what an adapter spends, and how much each layer makes of it."""
    parts = [find_components(layer) for layer in adapter.layers]
    total = sum(part.energy for part in parts)
    layers = tuple(
        LayerSummary(
            name=part.layer.name,
            rank=part.layer.r,
            inputs=part.layer.inputs,
            outputs=part.layer.outputs,
            parameters=part.layer.parameters,
            share=part.layer.parameters / adapter.parameters,
            norm=part.energy**0.5,
            energy_share=part.energy / total if total else 0.0,
            kept_by_half=part.kept((part.layer.r + 1) // 2),
            effective_rank=part.effective_rank,
        )
        for part in parts
    )
    return AdapterSummary(
        base_model=adapter.base_model,
        layers=layers,
        parameters=adapter.parameters,
        other_parameters=sum(tensor.numel() for tensor in adapter.others.values()),
    )
