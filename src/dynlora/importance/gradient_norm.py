"""`gradient_norm`: gradients in, their root mean square over steps out.

This is the usual score in the literature. It cannot tell need from noise; prefer `signal`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.importance.averages import StepMean, squared_norms
from dynlora.types import BasisChange, FeatureStats, LoraLayer

DECAY = 0.95
"""Weight of the past in one step: a memory of about 20 steps."""


class GradientNormMetric:
    """Running mean of the squared gradient norm of both factors, per parameter of one rank."""

    def __init__(self) -> None:
        self._power = StepMean(DECAY)

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add this step's squared norms."""
        self._power.add(
            [layer.name for layer in layers],
            squared_norms(layers),
            counts=torch.stack([layer.finite for layer in layers]),
        )

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return the root of the mean squared norm per parameter of one rank."""
        costs = {layer.name: layer.cost for layer in layers}
        means = self._power.means(costs)
        return {name: math.sqrt(power / costs[name]) for name, power in means.items()}

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: a norm over all ranks does not depend on the basis."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return weighted sum and weight per layer."""
        return self._power.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._power.load_state_dict(state)
