"""Summarize a saved adapter's parameters and energy per layer, for `dynlora inspect`."""

from dataclasses import asdict, dataclass
from typing import Any

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.spectrum import find_components


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """Figures of one layer."""

    name: str
    rank: int
    inputs: int
    outputs: int
    parameters: int
    share: float
    """Share of all LoRA parameters, in ``[0, 1]``."""
    norm: float
    """Frobenius norm of the update, including scaling."""
    energy_share: float
    """Share of the sum of all layers' squared norms, in ``[0, 1]``; 0 for an untrained adapter."""
    kept_by_half: float
    """Share of the layer's squared norm in the stronger half of its directions (rounded up)."""
    effective_rank: float
    """Effective number of directions of the update, in ``[1, rank]``; 0 for a zero update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSummary:
    """Figures of all layers."""

    base_model: str
    """Name in the adapter's configuration; empty if missing."""
    layers: tuple[LayerSummary, ...]
    parameters: int
    """Parameters of the LoRA layers."""
    other_parameters: int
    """Parameters of all other tensors, such as a classifier."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


def summarise(adapter: SavedAdapter) -> AdapterSummary:
    """Return the parameters and energy of each layer."""
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
