"""Running means over observed steps: of one number per layer, and of the gradient of `lora_B`."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynlora.types import BasisChange, LoraLayer

DECAY = 0.97
"""Weight of the past in one step: a memory of about 30 steps."""


def are_known_finite(finite: Bool[Tensor, " layers"]) -> bool:
    """Return whether all layers' gradients are finite on a CPU; False on other devices.

    Filtering out non-finite gradients copies them, which on a CPU costs more than all other work on
    gradients. On a GPU the check would synchronize.
    """
    return finite.is_cpu and bool(finite.all())


def squared_norms(layers: Sequence[LoraLayer]) -> Float[Tensor, " layers"]:
    """Return the squared norm of each layer's gradient of both factors, in float64."""
    norms_A = torch._foreach_norm([layer.grad_A.float() for layer in layers])
    norms_B = torch._foreach_norm([layer.grad_B.float() for layer in layers])
    return torch.stack(norms_A).double().square() + torch.stack(norms_B).double().square()


class StepMean:
    """Bias-corrected running mean by module name; only `means` synchronizes with the device."""

    def __init__(self, decay: float) -> None:
        """Start with the weight of the past per step, in ``(0, 1]``; 1 weights all equally."""
        self._decay = decay
        self._sums: dict[str, Tensor] = {}
        """Weighted sum and sum of weights, by module name."""

    def add(
        self,
        names: Sequence[str],
        values: Float[Tensor, " layers"],
        *,
        counts: Bool[Tensor, " layers"],
    ) -> None:
        """Add one step's numbers, in float64, of the layers that count."""
        none = values.new_zeros(2)
        old = torch.stack([self._sums.get(name, none) for name in names])
        new = self._decay * old + torch.stack([values, torch.ones_like(values)], dim=1)
        kept = torch.where(counts[:, None], new, old)
        self._sums.update(zip(names, kept.unbind(), strict=True))

    def means(self, names: Iterable[str]) -> dict[str, float]:
        """Return the means by module name, without layers that no step counted for."""
        seen = [name for name in names if name in self._sums]
        sums = torch.stack([self._sums[name] for name in seen]).tolist() if seen else []
        pairs = zip(seen, sums, strict=True)
        return {name: total / weight for name, (total, weight) in pairs if weight > 0}

    def state_dict(self) -> dict[str, Tensor]:
        """Return weighted sum and sum of weights per layer."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._sums = {name: sums.clone() for name, sums in state.items()}


class RunningMeanGradient:
    """Bias-corrected exponential moving average of dL/dB by module name, in which noise cancels."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add one step's finite gradients."""
        finite = torch.stack([layer.finite for layer in layers])
        gradients = [layer.grad_B.float() for layer in layers]
        names = [layer.name for layer in layers]
        for name, gradient in zip(names, gradients, strict=True):
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(gradient)
                self._weights[name] = gradient.new_zeros((), dtype=torch.float64)
        sums = [self._sums[name] for name in names]
        if not are_known_finite(finite):
            # Interpolating a sum with itself does not change it.
            gradients = list(map(torch.where, finite, gradients, sums))
        torch._foreach_lerp_(sums, gradients, 1 - DECAY)
        old = torch.stack([self._weights[name] for name in names])
        weights = torch.where(finite, 1 - DECAY * (1 - old), old)
        self._weights.update(zip(names, weights.unbind(), strict=True))

    def mean(self, name: str) -> Tensor | None:
        """Return one layer's mean gradient, of shape ``(out, r)``; None if never observed."""
        weight = self._weights.get(name)
        return self._sums[name] / weight if weight is not None and weight > 0 else None

    def norms(self) -> dict[str, float]:
        """Return the Frobenius norm of each mean gradient, by module name."""
        if not self._sums:
            return {}
        norms = torch.stack(torch._foreach_norm(list(self._sums.values()))).tolist()
        weights = torch.stack(list(self._weights.values())).tolist()
        return {
            name: norm / weight
            for name, norm, weight in zip(self._sums, norms, weights, strict=True)
            if weight > 0
        }

    @torch.no_grad()
    def rebase(self, change: BasisChange) -> None:
        """Map the mean to a layer's new basis, exactly as the gradient of `lora_B`."""
        if not change.to_A.any():  # no old direction is left: restart the mean
            self._sums.pop(change.name, None)
            self._weights.pop(change.name, None)
        old = self._sums.get(change.name)
        if old is not None:
            new = old.double() @ change.to_A.mT
            self._sums[change.name] = new.to(old.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Return sums and weights as tensors keyed ``sum/<module>`` and ``weight/<module>``."""
        sums = {f"sum/{name}": value for name, value in self._sums.items()}
        weights = {f"weight/{name}": value for name, value in self._weights.items()}
        return sums | weights

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        names = [key.removeprefix("sum/") for key in state if key.startswith("sum/")]
        self._sums = {name: state[f"sum/{name}"].clone() for name in names}
        self._weights = {name: state[f"weight/{name}"].clone() for name in names}
