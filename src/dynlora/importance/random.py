"""`random`: the control that moves ranks without looking."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


class RandomMetric:
    """Scores drawn from (0, 1], anew at each event, from the seed and the layer's name alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._events = 0

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Read nothing."""

    def scores(
        self,
        layers: Sequence[LoraLayer],
        features: Mapping[str, FeatureStats],
    ) -> dict[str, float]:
        """Return fresh scores; the global random state is neither read nor moved."""
        self._events += 1
        return {layer.name: self._draw(layer.name) for layer in layers}

    def _draw(self, name: str) -> float:
        digest = hashlib.sha256(f"{self._seed}/{self._events}/{name}".encode()).digest()
        return (int.from_bytes(digest[:6], "big") + 1) / 2**48

    def rebase(self, change: BasisChange) -> None:
        """Follow nothing: scores do not depend on ranks."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return how many events were drawn."""
        return {"events": torch.tensor(self._events)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._events = int(state["events"])
