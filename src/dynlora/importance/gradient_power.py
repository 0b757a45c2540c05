"""`gradient_norm` and `fisher`: gradients in, a running mean of their squares out.

`gradient_norm` is the usual score in the literature, `fisher` the diagonal of the empirical Fisher
information. Both include noise and cannot tell it from need; prefer `signal`.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dynlora.importance.averages import StepMean, squared_norms
from dynlora.types import BasisChange, FeatureStats, LoraLayer

DECAY = 0.95
"""Weight of the past in one step of `gradient_norm`: a memory of about 20 steps."""


class GradientPowerMetric:
    """A score of the running mean of the squared gradient norm of both factors."""

    def __init__(
        self,
        *,
        decay: float,
        divisor: Callable[[LoraLayer], int],
        score: Callable[[float, LoraLayer], float],
    ) -> None:
        """Average the squared norm over `divisor` with this `decay`; `score` gets the mean."""
        self._power = StepMean(decay)
        self._divisor = divisor
        self._score = score

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add this step's squared norms."""
        squares = zip(layers, squared_norms(layers), strict=True)
        self._power.add(
            [layer.name for layer in layers],
            torch.stack([square / self._divisor(layer) for layer, square in squares]),
            counts=torch.stack([layer.finite for layer in layers]),
        )

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return the scores of the means."""
        by_name = {layer.name: layer for layer in layers}
        means = self._power.means(by_name)
        return {name: self._score(mean, by_name[name]) for name, mean in means.items()}

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: a norm over all ranks does not depend on the basis."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return weighted sum and weight per layer."""
        return self._power.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._power.load_state_dict(state)


def gradient_norm() -> GradientPowerMetric:
    """Return the metric of the root mean square over recent steps, per parameter of one rank."""
    return GradientPowerMetric(
        decay=DECAY,
        divisor=lambda _: 1,
        score=lambda power, layer: math.sqrt(power / layer.cost),
    )


def fisher() -> GradientPowerMetric:
    """Return the metric of the mean square over all steps, equally weighted, and all parameters."""
    return GradientPowerMetric(
        decay=1,
        divisor=lambda layer: layer.r * layer.cost,
        score=lambda mean, _: mean,
    )
