"""`sensitivity`: AdaLoRA's score, smoothed |weight * gradient| times its uncertainty."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer

BETA = 0.85
"""Weight of the past in both averages. [beta1 and beta2 of `peft.AdaLoraConfig`]"""


class SensitivityMetric:
    """Mean over a layer's parameters of ``I * U``, each element smoothed over steps.

    ``I`` averages ``|w * dL/dw|`` and ``U`` averages ``||w * dL/dw| - I|``, as in AdaLoRA. After a
    change of rank a layer starts again from its own means, because elements have no meaning
    in a new basis.

    Reference:
        Zhang et al. 2023, "AdaLoRA", as implemented in `peft.tuners.adalora.RankAllocator`.
    """

    def __init__(self) -> None:
        self._elements: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Update both averages of every element of `lora_A` and `lora_B`."""
        for layer in layers:
            for key, weight, gradient in _weights(layer):
                sensitivity = (weight * gradient).abs().float()
                zeros = weight.new_zeros(2, *weight.shape, dtype=torch.float32)
                state = self._elements.setdefault(key, zeros)
                importance, uncertainty = state[0], state[1]
                importance.lerp_(sensitivity, 1 - BETA)
                uncertainty.lerp_((sensitivity - importance).abs(), 1 - BETA)

    def scores(
        self,
        layers: Sequence[LoraLayer],
        features: Mapping[str, FeatureStats],
    ) -> dict[str, float]:
        """Return the mean of ``I * U`` over a layer's parameters."""
        scores: dict[str, float] = {}
        for layer in layers:
            states = [self._elements[key] for key in _keys(layer.name) if key in self._elements]
            if states:
                total = sum(float((state[0] * state[1]).sum()) for state in states)
                scores[layer.name] = total / sum(state[0].numel() for state in states)
        return scores

    def rebase(self, change: BasisChange) -> None:
        """Give every element of the resized layer the mean of its old elements."""
        new = change.to_A.shape[0]
        for key, axis in zip(_keys(change.name), (1, 2), strict=True):
            state = self._elements.get(key)
            if state is not None:
                shape = list(state.shape)
                shape[axis] = new
                means = state.mean(dim=(1, 2), keepdim=True)
                self._elements[key] = means.expand(shape).clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Return both averages, stacked, by ``<module>/A`` and ``<module>/B``."""
        return dict(self._elements)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._elements = {key: value.clone() for key, value in state.items()}


def _weights(layer: LoraLayer) -> list[tuple[str, Tensor, Tensor]]:
    key_A, key_B = _keys(layer.name)
    return [(key_A, layer.lora_A, layer.grad_A), (key_B, layer.lora_B, layer.grad_B)]


def _keys(name: str) -> tuple[str, str]:
    return f"{name}/A", f"{name}/B"
