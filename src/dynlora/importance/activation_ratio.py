"""`activation_ratio`: sampled tokens in, the adapter's part of each layer's output norm out."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


class ActivationRatioMetric:
    """Ratio of the adapter's output norm to the layer's output norm.

    Norms are root mean squares over the feature analyzer's sample. Uses no gradient and no state.
    """

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
