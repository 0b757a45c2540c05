"""`magnitude`: how far the adapter has moved the layer's weight."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


class MagnitudeMetric:
    """Frobenius norm of ``scaling * B @ A``, per square root of the layer's cost.

    Large where training has gone far, not where it still wants to go. It needs no gradient and
    keeps no state.
    """

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Read nothing: the weights hold all that is needed."""

    @torch.no_grad()
    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return ``|scaling * B A| / sqrt(cost)``, from two r x r matrices."""
        scores: dict[str, float] = {}
        for layer in layers:
            A, B = layer.lora_A.double(), layer.lora_B.double()
            power = float(((B.T @ B) * (A @ A.T)).sum())  # |BA|^2 = tr(A^T B^T B A)
            scores[layer.name] = abs(layer.scaling) * math.sqrt(max(power, 0.0) / layer.cost)
        return scores

    def rebase(self, change: BasisChange) -> None:
        """Follow nothing: no state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from nothing: no state."""
