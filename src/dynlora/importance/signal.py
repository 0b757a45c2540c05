"""`signal`: gradients in, the norm of their running mean out."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from dynlora.importance.averages import RunningMeanGradient
from dynlora.types import BasisChange, FeatureStats, LoraLayer


class SignalMetric:
    """Frobenius norm of the mean of dL/dB, per square root of the layer's cost."""

    def __init__(self) -> None:
        self._gradients = RunningMeanGradient()

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add this step's gradients of `lora_B`."""
        self._gradients.observe(layers)

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return ``|mean dL/dB| / sqrt(cost)``."""
        norms = self._gradients.norms()
        return {
            layer.name: norms[layer.name] / math.sqrt(layer.cost)
            for layer in layers
            if layer.name in norms
        }

    def rebase(self, change: BasisChange) -> None:
        """Map the mean gradient to the new basis."""
        self._gradients.rebase(change)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running mean's sums and weights."""
        return self._gradients.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._gradients.load_state_dict(state)
