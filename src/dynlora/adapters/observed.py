"""What was seen of layers' inputs since the last event, as far as it can tell of their outputs."""

from collections.abc import Mapping, Sequence

from dynlora.adapters.layers import LoraView
from dynlora.types import FeatureStats, Tokens


def enough_seen(
    layers: Sequence[LoraView], features: Mapping[str, FeatureStats]
) -> list[FeatureStats | None]:
    """Return what was seen of each layer's input if it can show every component's strength.

    On fewer tokens than components some would seem to add nothing. Of ids, `EmbeddingKind.see`
    knows what the sample lacks.
    """
    found = [features.get(layer.name) for layer in layers]
    return [
        stats if stats is not None and _shows(stats.tokens, layer.r) else None
        for layer, stats in zip(layers, found, strict=True)
    ]


def _shows(tokens: Tokens, rank: int) -> bool:
    return len(tokens) >= rank or not tokens.is_floating_point()


def tokens_of(stats: FeatureStats | None) -> Tokens | None:
    """Return the tokens; None, which stands for white input, where none were seen."""
    return None if stats is None else stats.tokens


def output_norm(layer: LoraView, stats: FeatureStats | None) -> float:
    """Return the root mean square norm of a layer's output, on white input where none was seen."""
    return layer.base_norm if stats is None else float(stats.output_power**0.5)
