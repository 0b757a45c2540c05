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
        self._means: dict[str, Tensor] = {}
        """Running mean of the power and its weight, by module name."""

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Average the squared norms."""
        norms_A = torch._foreach_norm([layer.grad_A.float() for layer in layers])
        norms_B = torch._foreach_norm([layer.grad_B.float() for layer in layers])
        for layer, a, b in zip(layers, norms_A, norms_B, strict=True):
            power = a.double().square() + b.double().square()
            old = self._means.get(layer.name, power.new_zeros(2))
            step = torch.stack([power, torch.ones_like(power)])
            self._means[layer.name] = torch.where(layer.finite, old.lerp(step, 1 - DECAY), old)

    def scores(
        self,
        layers: Sequence[LoraLayer],
        features: Mapping[str, FeatureStats],
    ) -> dict[str, float]:
        """Return the root of the mean power per parameter of one rank."""
        seen = [layer for layer in layers if layer.name in self._means]
        means = [self._means[layer.name].tolist() for layer in seen]
        return {
            layer.name: math.sqrt(power / weight / layer.cost)
            for layer, (power, weight) in zip(seen, means, strict=True)
            if weight > 0
        }

    def rebase(self, change: BasisChange) -> None:
        """Keep the layer's mean: a norm over all ranks has no basis."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return power and weight per layer."""
        return dict(self._means)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._means = {name: values.clone() for name, values in state.items()}
