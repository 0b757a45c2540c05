"""Stage 1. Layer importance assessor: LoRA layers with gradients in, one score per layer out.

A score is importance *per parameter*: it says how much one more parameter is worth in this layer,
so that shares of the budget need no correction for a layer's size. Metrics never know budgets.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


@runtime_checkable
class ImportanceMetric(Protocol):
    """Anything that turns what it sees in training into a score per layer."""

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Read gradients. Called after `backward`, before the optimizer's step.

        `layers` are those that have gradients in this step. What is not `finite` must be left out,
        and no tensor read back: that would wait for the device in every step.
        """
        ...

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return importance by module name: finite, >= 0, larger means more important.

        A layer that was never observed is left out.
        """
        ...

    def rebase(self, change: BasisChange) -> None:
        """Follow a change of one layer's rank."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later scores depend on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        ...
