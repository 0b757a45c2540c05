"""`fisher`: gradients in, their mean square per parameter over all observed steps out.

This is the diagonal of the empirical Fisher information. Unlike `gradient_norm`, it weights all
steps equally, and averages over all ranks. It includes noise, so it does not measure need.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.importance.averages import StepMean, squared_norms
from dynlora.types import BasisChange, FeatureStats, LoraLayer


class FisherMetric:
    """Mean over steps and parameters of the squared gradient of `lora_A` and `lora_B`."""

    def __init__(self) -> None:
        self._squares = StepMean(decay=1)

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add the mean square of this step's gradients."""
        squares = zip(layers, squared_norms(layers), strict=True)
        self._squares.add(
            [layer.name for layer in layers],
            torch.stack([square / (layer.r * layer.cost) for layer, square in squares]),
            counts=torch.stack([layer.finite for layer in layers]),
        )

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return the mean squared gradient per parameter."""
        return self._squares.means(layer.name for layer in layers)

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: a mean over all parameters does not depend on the rank."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return sum and number of steps per layer."""
        return self._squares.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._squares.load_state_dict(state)
