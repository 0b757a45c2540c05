"""`activation_ratio`: how much the adapter changes the layer's output on observed tokens."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dynlora.types import BasisChange, FeatureStats, LoraLayer


class ActivationRatioMetric:
    """Norm of the adapter's output over the norm of the layer's whole output.

    The ratio is that of root mean squares over the tokens that the feature analyzer sampled.
    It needs no gradient and keeps no state.
    """

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Read nothing: the features hold all that is needed."""

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
        """Follow nothing: no state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from nothing: no state."""
