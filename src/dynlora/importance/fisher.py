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

from dynlora.importance.step_mean import StepMean
from dynlora.types import BasisChange, FeatureStats, LoraLayer


class FisherMetric:
    """Mean over steps and parameters of the squared gradient of `lora_A` and `lora_B`."""

    def __init__(self) -> None:
        self._squares = StepMean(decay=1)

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Add the mean square of this step's gradients."""
        norms_A = torch._foreach_norm([layer.grad_A.float() for layer in layers])
        norms_B = torch._foreach_norm([layer.grad_B.float() for layer in layers])
        squares = [
            (a.double().square() + b.double().square()) / (layer.r * layer.cost)
            for layer, a, b in zip(layers, norms_A, norms_B, strict=True)
        ]
        self._squares.add(
            [layer.name for layer in layers],
            torch.stack(squares),
            counts=torch.stack([layer.finite for layer in layers]),
        )

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return the mean squared gradient per parameter."""
        return self._squares.means(layer.name for layer in layers)

    def rebase(self, change: BasisChange) -> None:
        """Keep the layer's mean: it is one over all parameters, whatever their number."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return sum and number of steps per layer."""
        return self._squares.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._squares.load_state_dict(state)
