"""`magnitude`, `activation_ratio` and `uniform`: weights and features in, scores out, no state.

Weights show past training, not remaining need.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer

Scores = Callable[[Sequence[LoraLayer], Mapping[str, FeatureStats]], dict[str, float]]


class StatelessMetric:
    """A metric whose scores depend only on the layers and features of the event."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Do nothing."""

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: no state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: no state."""


def magnitude() -> StatelessMetric:
    """Return the metric ``|scaling * B A| / sqrt(cost)``, a Frobenius norm."""
    return StatelessMetric(_update_norms)


def activation_ratio() -> StatelessMetric:
    """Return the metric ``|scaling * B A x| / |W x + scaling * B A x|`` over the sampled tokens."""
    return StatelessMetric(_output_ratios)


def uniform() -> StatelessMetric:
    """Return the control that scores every layer 1, which is plain LoRA."""
    return StatelessMetric(lambda layers, _: {layer.name: 1.0 for layer in layers})


@torch.no_grad()
def _update_norms(
    layers: Sequence[LoraLayer], _features: Mapping[str, FeatureStats]
) -> dict[str, float]:
    """Compute ``|scaling * B A| / sqrt(cost)`` from two r x r matrices per layer."""
    scores: dict[str, float] = {}
    for layer in layers:
        A, B = layer.lora_A.double(), layer.lora_B.double()
        power = float(((B.mT @ B) * (A @ A.mT)).sum())  # |BA|^2 = tr(A^T B^T B A)
        scores[layer.name] = abs(layer.scaling) * math.sqrt(max(power, 0.0) / layer.cost)
    return scores


def _output_ratios(
    layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
) -> dict[str, float]:
    """Compute the ratio of root mean square norms of the adapter's and the layer's output."""
    scores: dict[str, float] = {}
    for layer in layers:
        stats = features.get(layer.name)
        if stats is not None and stats.output_power != 0:
            power = layer.added_power(stats.tokens)
            scores[layer.name] = (power / stats.output_power) ** 0.5
    return scores
