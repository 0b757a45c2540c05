"""`uniform`: control with equal scores, which is plain LoRA."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


class UniformMetric:
    """Score 1 for every layer."""

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Do nothing."""

    def scores(
        self,
        layers: Sequence[LoraLayer],
        features: Mapping[str, FeatureStats],
    ) -> dict[str, float]:
        """Return 1 for every layer."""
        return {layer.name: 1.0 for layer in layers}

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: no state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: no state."""
