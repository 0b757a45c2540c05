"""Layer inputs since the last event, where they suffice to measure outputs."""

from collections.abc import Mapping, Sequence

from dynlora.adapters.layers import LoraView
from dynlora.types import FeatureStats, Tokens


def enough_seen(
    layers: Sequence[LoraView], features: Mapping[str, FeatureStats]
) -> list[FeatureStats | None]:
    """Return each layer's input statistics, or None with fewer tokens than components.

    With fewer tokens, some components would seem to add nothing. Ids are exempt, because
    `EmbeddingKind.see` accounts for ids outside the sample.
    """
    found = [features.get(layer.name) for layer in layers]
    return [
        stats if stats is not None and _shows(stats.tokens, layer.r) else None
        for layer, stats in zip(layers, found, strict=True)
    ]


def _shows(tokens: Tokens, rank: int) -> bool:
    return len(tokens) >= rank or not tokens.is_floating_point()


def tokens_of(stats: FeatureStats | None) -> Tokens | None:
    """Return the sampled tokens; None without a sample, which stands for unit-covariance input."""
    return None if stats is None else stats.tokens


def output_norm(layer: LoraView, stats: FeatureStats | None) -> float:
    """Return the root mean square norm of a layer's output, or `base_norm` without a sample."""
    return layer.base_norm if stats is None else float(stats.output_power**0.5)
