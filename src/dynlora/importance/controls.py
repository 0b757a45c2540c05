"""`uniform` and `random`: controls that observe nothing, equal or random scores out."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


class UniformMetric:
    """Score 1 for every layer, which is plain LoRA."""

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Do nothing."""

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return 1 for every layer."""
        return {layer.name: 1.0 for layer in layers}

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: no state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: no state."""


class RandomMetric:
    """Uniform scores in (0, 1] from the hash of the seed, the event and the layer's name."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._events = 0

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Do nothing."""

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return new scores; do not use the global random state."""
        self._events += 1
        return {layer.name: self._draw(layer.name) for layer in layers}

    def _draw(self, name: str) -> float:
        digest = hashlib.sha256(f"{self._seed}/{self._events}/{name}".encode()).digest()
        return (int.from_bytes(digest[:6], "big") + 1) / 2**48

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: scores do not depend on ranks."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of events so far."""
        return {"events": torch.tensor(self._events)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._events = int(state["events"])
