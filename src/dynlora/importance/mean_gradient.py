"""`signal` and `spectral`: gradients in, a size of their running mean per root of the cost out."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora.importance.averages import RunningMeanGradient
from dynlora.types import BasisChange, FeatureStats, LoraLayer

Sizes = Callable[[RunningMeanGradient, Sequence[LoraLayer]], dict[str, float]]
"""Returns a size of the mean of dL/dB by module name, without layers that have none."""


class MeanGradientMetric:
    """A size of the mean of dL/dB, per square root of the layer's cost."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._gradients = RunningMeanGradient()

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add this step's gradients of `lora_B`."""
        self._gradients.observe(layers)

    @torch.no_grad()
    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return the sizes over ``sqrt(cost)``."""
        costs = {layer.name: layer.cost for layer in layers}
        sizes = self._sizes(self._gradients, layers)
        return {name: size / math.sqrt(costs[name]) for name, size in sizes.items()}

    def rebase(self, change: BasisChange) -> None:
        """Map the mean gradient to the new basis."""
        self._gradients.rebase(change)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running mean's sums and weights."""
        return self._gradients.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._gradients.load_state_dict(state)


def signal() -> MeanGradientMetric:
    """Return the metric of the mean's Frobenius norm."""
    return MeanGradientMetric(_norms)


def spectral() -> MeanGradientMetric:
    """Return the metric of the mean's mean singular value.

    Near ``B = 0``, ``dL/dB = scaling * G @ A.T`` is a random sketch of the full gradient G. Unlike
    the norm, the mean singular value tells one needed direction from many.
    """
    return MeanGradientMetric(_mean_singular_values)


def _norms(gradients: RunningMeanGradient, layers: Sequence[LoraLayer]) -> dict[str, float]:
    norms = gradients.norms()
    return {layer.name: norms[layer.name] for layer in layers if layer.name in norms}


def _mean_singular_values(
    gradients: RunningMeanGradient, layers: Sequence[LoraLayer]
) -> dict[str, float]:
    means = {layer.name: gradients.mean(layer.name) for layer in layers}
    return {
        layer.name: _nuclear_norm(mean) / layer.r
        for layer in layers
        if (mean := means[layer.name]) is not None
    }


def _nuclear_norm(mean: Float[Tensor, "*experts out r"]) -> float:
    """Return the sum of the singular values; of a stack, the root of its experts' summed squares.

    Like a Frobenius norm, it then grows with the root of the number of experts, as ``sqrt(cost)``.
    """
    return float(torch.linalg.svdvals(mean).sum(dim=-1).norm())
