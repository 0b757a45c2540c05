"""`gradient_norm`: root mean square of the gradients, averaged over steps.

Kept as the field's usual score. It cannot tell an unmet need from noise: prefer `signal`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer

DECAY = 0.95
"""Weight of the past in one step: a memory of about 20 steps."""


class GradientNormMetric:
    """Running mean of the gradient power of `lora_A` and `lora_B`, per parameter of one rank."""

    def __init__(self) -> None:
        self._power: dict[str, Tensor] = {}
        self._weight: dict[str, float] = {}

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Average the squared norms."""
        norms_A = torch._foreach_norm([layer.grad_A for layer in layers])
        norms_B = torch._foreach_norm([layer.grad_B for layer in layers])
        for layer, a, b in zip(layers, norms_A, norms_B, strict=True):
            power = a.float().square() + b.float().square()
            old = self._power.get(layer.name, torch.zeros_like(power))
            self._power[layer.name] = torch.lerp(old, power, 1 - DECAY)
            weight = self._weight.get(layer.name, 0.0)
            self._weight[layer.name] = DECAY * weight + (1 - DECAY)

    def scores(
        self,
        layers: Sequence[LoraLayer],
        features: Mapping[str, FeatureStats],
    ) -> dict[str, float]:
        """Return the root of the mean power per parameter of one rank."""
        return {
            layer.name: math.sqrt(
                float(self._power[layer.name]) / self._weight[layer.name] / layer.cost
            )
            for layer in layers
            if layer.name in self._power
        }

    def rebase(self, change: BasisChange) -> None:
        """Keep the layer's mean: a norm over all ranks has no basis."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return power and weight per layer."""
        return {
            name: torch.tensor([float(power), self._weight[name]], dtype=torch.float64)
            for name, power in self._power.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._power = {name: values[0].float() for name, values in state.items()}
        self._weight = {name: float(values[1]) for name, values in state.items()}
