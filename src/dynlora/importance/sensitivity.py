"""`sensitivity`: AdaLoRA's score, smoothed |weight * gradient| times its uncertainty."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer

BETA = 0.85
"""Weight of the past in both averages. [beta1 and beta2 of `peft.AdaLoraConfig`]"""


class SensitivityMetric:
    """Mean of ``I * U`` over a layer's parameters, with ``I`` and ``U`` averaged over steps.

    ``I`` averages ``|w * dL/dw|`` and ``U`` averages ``||w * dL/dw| - I|``, as in Zhang et al.
    2023, "AdaLoRA", and `peft.tuners.adalora.RankAllocator`.
    """

    def __init__(self) -> None:
        self._elements: dict[str, Tensor] = {}
        """Both averages, stacked, by layer and factor."""
        self._seen: dict[str, Tensor] = {}
        """Whether a layer ever had finite gradients, by module name."""

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Update both averages of every element of `lora_A` and `lora_B`."""
        for layer in layers:
            finite = layer.finite
            self._seen[layer.name] = self._seen.get(layer.name, finite) | finite
            for key, weight, gradient in _weights(layer):
                sensitivity = (weight.float() * gradient.float()).abs()
                zeros = weight.new_zeros(2, *weight.shape, dtype=torch.float32)
                state = self._elements.setdefault(key, zeros)
                importance, uncertainty = state[0], state[1]
                # Interpolating an average with itself does not change it.
                importance.lerp_(torch.where(finite, sensitivity, importance), 1 - BETA)
                distance = (sensitivity - importance).abs()
                uncertainty.lerp_(torch.where(finite, distance, uncertainty), 1 - BETA)

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return the mean of ``I * U`` over each layer's parameters."""
        scores: dict[str, float] = {}
        for layer in layers:
            if bool(self._seen.get(layer.name)):
                states = [self._elements[key] for key in _keys(layer.name)]
                total = sum(float((state[0] * state[1]).sum()) for state in states)
                scores[layer.name] = total / sum(state[0].numel() for state in states)
        return scores

    def rebase(self, change: BasisChange) -> None:
        """Set every element to its factor's mean, because elements belong to the old basis."""
        new = change.to_A.shape[-2]
        for key, axis in zip(_keys(change.name), (-2, -1), strict=True):
            state = self._elements.get(key)
            if state is not None:
                shape = list(state.shape)
                shape[axis] = new
                means = state.mean(dim=(-2, -1), keepdim=True)
                self._elements[key] = means.expand(shape).clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors keyed ``<module>/A``, ``<module>/B`` and ``<module>/seen``."""
        return self._elements | {f"{name}/seen": seen for name, seen in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        copies = {key: value.clone() for key, value in state.items()}
        marks = [key for key in copies if key.endswith("/seen")]
        self._seen = {key.removesuffix("/seen"): copies.pop(key) for key in marks}
        self._elements = copies


def _weights(layer: LoraLayer) -> list[tuple[str, Tensor, Tensor]]:
    key_A, key_B = _keys(layer.name)
    B = layer.lora_B if layer.weight == 1 else layer.lora_B * layer.weight
    return [(key_A, layer.lora_A, layer.grad_A), (key_B, B, layer.grad_B)]


def _keys(name: str) -> tuple[str, str]:
    return f"{name}/A", f"{name}/B"
