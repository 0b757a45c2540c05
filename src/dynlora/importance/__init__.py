"""Stage 1. Layer importance assessor: LoRA layers with gradients in, one score per layer out.

A score is the worth of one more parameter in the layer, so that shares need no correction for a
layer's size. Metrics do not depend on the budget.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Protocol, runtime_checkable

from torch import Tensor

from dynlora.config import METRICS, load
from dynlora.types import BasisChange, FeatureStats, LoraLayer


@runtime_checkable
class ImportanceMetric(Protocol):
    """Protocol of a metric that computes a score per layer from observed steps."""

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Read the gradients of `layers`, between `backward` and the optimizer's step.

        Implementations must skip non-finite layers (`LoraLayer.finite`), without synchronizing with
        the device.
        """

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return scores by module name: finite, >= 0, larger means more important.

        Layers without an observation are left out.
        """
        ...

    def rebase(self, change: BasisChange) -> None:
        """Adapt the state to a change of one layer's rank."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that later scores depend on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""


def build_metric(importance: str | ImportanceMetric, *, seed: int) -> ImportanceMetric:
    """Return a new metric by name, or a copy of a metric, so that runs share no state."""
    if not isinstance(importance, str):
        return deepcopy(importance)
    kind = load(METRICS[importance])
    metric: ImportanceMetric = kind(seed) if importance == "random" else kind()
    return metric
