"""Running mean of each layer's gradient of `lora_B`.

Shared by the metrics that take the norm *after* averaging, so that noise averages out first.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, LoraLayer

DECAY = 0.97
"""Weight of the past in one step: a memory of about 30 steps."""


class RunningMeanGradient:
    """Exponentially weighted mean of dL/dB by module name, in float32, free of start-up bias."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add one step's gradients."""
        gradients = [layer.grad_B.float() for layer in layers]
        for layer, gradient in zip(layers, gradients, strict=True):
            if layer.name not in self._sums:
                self._sums[layer.name] = torch.zeros_like(gradient)
            self._weights[layer.name] = 1 - DECAY * (1 - self._weights.get(layer.name, 0.0))
        torch._foreach_lerp_([self._sums[layer.name] for layer in layers], gradients, 1 - DECAY)

    def mean(self, name: str) -> Tensor | None:
        """Return the mean gradient of one layer, of shape ``(out, r)``; None if never observed."""
        if name not in self._sums:
            return None
        return self._sums[name] / self._weights[name]

    def norms(self) -> dict[str, float]:
        """Return the Frobenius norm of each mean gradient, by module name."""
        if not self._sums:
            return {}
        norms = torch.stack(torch._foreach_norm(list(self._sums.values()))).tolist()
        return {
            name: norm / self._weights[name] for name, norm in zip(self._sums, norms, strict=True)
        }

    @torch.no_grad()
    def rebase(self, change: BasisChange) -> None:
        """Follow a change of rank by the exact map of the gradient of `lora_B`."""
        old = self._sums.get(change.name)
        if old is not None:
            new = change.scale_ratio * (old.double() @ change.to_A.T)
            self._sums[change.name] = new.to(old.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Return sums and weights as tensors keyed ``sum/<module>`` and ``weight/<module>``."""
        sums = {f"sum/{name}": value for name, value in self._sums.items()}
        weights = {
            f"weight/{name}": torch.tensor(value, dtype=torch.float64)
            for name, value in self._weights.items()
        }
        return sums | weights

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        names = [key.removeprefix("sum/") for key in state if key.startswith("sum/")]
        self._sums = {name: state[f"sum/{name}"].clone() for name in names}
        self._weights = {name: float(state[f"weight/{name}"]) for name in names}
