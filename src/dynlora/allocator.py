"""Stage 2. Weight allocator: importance scores to shares and layer weights, without tensors."""

import math
from collections.abc import Mapping, Sequence

from dynlora.config import DynamicLoraConfig
from dynlora.types import Assessment, FeatureStats, LayerShape, is_informative

LAYER_WEIGHT_RANGE = (0.5, 2.0)
"""Range of layer weights, which bounds how far learning rates differ between layers."""


def allocate(
    assessed: Assessment,
    layers: Sequence[LayerShape],
    features: Mapping[str, FeatureStats],
    config: DynamicLoraConfig,
) -> dict[str, float]:
    """Return each layer's share of the budget; layers without gradients get none."""
    sharing = [layer for layer in layers if layer.name not in assessed.lowered]
    spread = config.feature == "variance"
    figures = {n: s.variance if spread else s.effective_rank for n, s in features.items()}
    shares = allocate_shares(
        assessed.scores,
        {layer.name: layer.cost for layer in sharing},
        held={layer.name: layer.r for layer in layers},
        gains=feature_gains(figures, config.feature_weight),
        temperature=config.temperature,
        uniform_mix=config.uniform_mix,
    )
    return shares | dict.fromkeys(assessed.lowered, 0.0)


def allocate_shares(
    scores: Mapping[str, float],
    costs: Mapping[str, int],
    *,
    held: Mapping[str, int],
    gains: Mapping[str, float],
    temperature: float = 1.0,
    uniform_mix: float = 0.0,
) -> dict[str, float]:
    """Split the budget: ``share ∝ cost * (score * gain) ** (1 / temperature)``, mixed with uniform.

    Shares sum to 1. If scores are missing, all zero or all equal, ``share ∝ cost * held`` for any
    gains: every layer keeps its rank, and unspent budget is split in proportion to the ranks. A
    layer without a score counts as average. `uniform_mix` is the part that gives all layers equal
    ranks.
    """
    as_held = _over_sum({name: costs[name] * held[name] for name in costs})
    if not is_informative(scores):
        return as_held
    names = sorted(costs)
    relative, mean = _over_highest(scores)
    values = {name: relative.get(name, mean) * gains.get(name, 1.0) for name in names}
    top = max(values.values())
    if top == 0:
        return as_held
    base = _over_sum(costs)
    powered = {name: costs[name] * (values[name] / top) ** (1 / temperature) for name in names}
    wanted = _over_sum(powered)
    return {name: uniform_mix * base[name] + (1 - uniform_mix) * wanted[name] for name in names}


def allocate_layer_weights(scores: Mapping[str, float], names: list[str]) -> dict[str, float]:
    """Return each layer's score over the mean score, clamped to [1/2, 2]; 1 without a score."""
    if not is_informative(scores):
        return dict.fromkeys(names, 1.0)
    low, high = LAYER_WEIGHT_RANGE
    relative, mean = _over_highest(scores)
    return {name: min(max(relative.get(name, mean) / mean, low), high) for name in names}


def feature_gains(figures: Mapping[str, float], feature_weight: float) -> dict[str, float]:
    """Return gains by module name: ``(figure / mean figure) ** feature_weight``."""
    if not any(figures.values()):
        return {}
    mean = math.fsum(figures.values()) / len(figures)
    return {name: (figure / mean) ** feature_weight for name, figure in figures.items()}


def _over_sum(values: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(values.values())
    return {name: value / total for name, value in values.items()}


def _over_highest(scores: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Return scores over the highest one, and their mean; unscaled sums could overflow."""
    high = max(scores.values())
    relative = {name: score / high for name, score in scores.items()}
    return relative, math.fsum(relative.values()) / len(relative)
