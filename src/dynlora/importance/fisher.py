"""`fisher`: mean squared gradient of the adapter's parameters, over all steps so far.

The diagonal of the empirical Fisher information, averaged over a layer: to second order, how much
the loss rises when one of its parameters is moved by a given step. What it has over
`gradient_norm`: every step counts alike, where that one forgets; it is a mean over the parameters
that the layer has, where that one is over those of one rank, so that a layer does not score higher
for being large already; and it is a square, so that shares follow it twice as sharply. Gradients
are those of batches, after clipping: the noise of a batch is in it, and that of the first steps
stays in it, so it makes no claim to find needs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


class FisherMetric:
    """Mean over steps and parameters of the squared gradient of `lora_A` and `lora_B`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        """Sum of mean squares and number of steps, by module name."""

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add the mean square of this step's gradients."""
        norms_A = torch._foreach_norm([layer.grad_A.float() for layer in layers])
        norms_B = torch._foreach_norm([layer.grad_B.float() for layer in layers])
        for layer, a, b in zip(layers, norms_A, norms_B, strict=True):
            square = (a.double().square() + b.double().square()) / (layer.r * layer.cost)
            old = self._sums.get(layer.name, square.new_zeros(2))
            new = old + torch.stack([square, torch.ones_like(square)])
            self._sums[layer.name] = torch.where(layer.finite, new, old)

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return the mean squared gradient per parameter."""
        sums = {layer.name: self._sums[layer.name] for layer in layers if layer.name in self._sums}
        pairs = {name: pair.tolist() for name, pair in sums.items()}
        return {name: total / steps for name, (total, steps) in pairs.items() if steps > 0}

    def rebase(self, change: BasisChange) -> None:
        """Keep the layer's mean: it is one over all parameters, whatever their number."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return sum and number of steps per layer."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._sums = {name: values.clone() for name, values in state.items()}
