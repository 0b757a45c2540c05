"""`magnitude`: LoRA factors in, norms of weight updates out: past training, not remaining need."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


class MagnitudeMetric:
    """Frobenius norm of ``scaling * B @ A``, per square root of the layer's cost."""

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Do nothing: scores depend only on weights."""

    @torch.no_grad()
    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return ``|scaling * B A| / sqrt(cost)``, computed from two r x r matrices."""
        scores: dict[str, float] = {}
        for layer in layers:
            A, B = layer.lora_A.double(), layer.lora_B.double()
            power = float(((B.mT @ B) * (A @ A.mT)).sum())  # |BA|^2 = tr(A^T B^T B A)
            scores[layer.name] = abs(layer.scaling) * math.sqrt(max(power, 0.0) / layer.cost)
        return scores

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: no state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: no state."""
