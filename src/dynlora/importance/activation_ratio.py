"""`activation_ratio`: sampled tokens in, the adapter's part of each layer's output norm out."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


class ActivationRatioMetric:
    """Ratio of root mean square norms of the adapter's and the layer's output on sampled tokens."""

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Do nothing: scores depend only on weights and features."""

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return ``|scaling * B A x| / |W x + scaling * B A x|`` over the sampled tokens."""
        scores: dict[str, float] = {}
        for layer in layers:
            stats = features.get(layer.name)
            if stats is None or stats.output_power == 0:
                continue
            power = layer.added_power(stats.tokens)
            scores[layer.name] = (power / stats.output_power) ** 0.5
        return scores

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: no state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: no state."""
