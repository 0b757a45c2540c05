"""`spectral`: gradients in, the mean singular value of their running mean out."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora.importance.averages import RunningMeanGradient
from dynlora.types import BasisChange, FeatureStats, LoraLayer


class SpectralMetric:
    """Mean singular value of the mean of dL/dB, per square root of the layer's cost.

    Near ``B = 0``, ``dL/dB = scaling * G @ A.T`` is a random sketch of the full gradient G. Unlike
    the norm, the mean singular value tells one needed direction from many.
    """

    def __init__(self) -> None:
        self._gradients = RunningMeanGradient()

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add this step's gradients of `lora_B`."""
        self._gradients.observe(layers)

    @torch.no_grad()
    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return the mean of the ``r`` singular values over ``sqrt(cost)``."""
        means = {layer.name: self._gradients.mean(layer.name) for layer in layers}
        return {
            layer.name: _nuclear_norm(mean) / layer.r / math.sqrt(layer.cost)
            for layer in layers
            if (mean := means[layer.name]) is not None
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


def _nuclear_norm(mean: Float[Tensor, "*experts out r"]) -> float:
    """Return the sum of the singular values; of a stack, the root of its experts' summed squares.

    Like a Frobenius norm, it then grows with the root of the number of experts, as ``sqrt(cost)``.
    """
    return float(torch.linalg.svdvals(mean).sum(dim=-1).norm())
