"""Stage 2. Weight allocator: importance scores to shares of the budget, and to layer weights.

Pure Python without tensors or models, so that tests can cover every property of the shares.
"""

import math
from collections.abc import Mapping

LAYER_WEIGHT_RANGE = (0.5, 2.0)
"""Range of layer weights, which bounds how far learning rates differ between layers."""

_EQUAL_WITHIN = 1e-9
"""Largest relative spread of scores that count as equal (float rounding)."""


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

    If scores are missing, all zero or all equal, ``share ∝ cost * held`` for any gains: every layer
    keeps its rank, and unspent budget is split in proportion to the ranks.

    Args:
        scores: Importance per parameter by module name, finite and >= 0. A layer without a score
            counts as average.
        costs: Parameters per rank by module name, of the layers that share the budget.
        held: Live rank by module name, at least 1.
        gains: Factor on a layer's score from its input features, >= 0; 1 if absent.
        temperature: Above 0; below 1 sharpens differences, above 1 flattens them.
        uniform_mix: Part of the budget that gives all layers equal ranks, in ``[0, 1]``.

    Returns:
        Share of the budget by module name, each >= 0, summing to 1.
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
    """Return each layer's weight: its score over the mean score, clamped to [1/2, 2].

    Args:
        scores: Importance per parameter by module name, finite and >= 0.
        names: Layers that get a weight; 1 for a layer without a score.
    """
    if not is_informative(scores):
        return dict.fromkeys(names, 1.0)
    low, high = LAYER_WEIGHT_RANGE
    relative, mean = _over_highest(scores)
    return {name: min(max(relative.get(name, mean) / mean, low), high) for name in names}


def feature_gains(figures: Mapping[str, float], feature_weight: float) -> dict[str, float]:
    """Return gains by module name: ``(figure / mean figure) ** feature_weight``.

    Args:
        figures: Effective rank or variance of the layer's input by module name, >= 0.
        feature_weight: Exponent, in ``[0, 1]``.
    """
    if not any(figures.values()):
        return {}
    mean = math.fsum(figures.values()) / len(figures)
    return {name: (figure / mean) ** feature_weight for name, figure in figures.items()}


def is_informative(scores: Mapping[str, float]) -> bool:
    """Return whether scores differ between layers."""
    if not scores:
        return False
    low, high = min(scores.values()), max(scores.values())
    return high - low > _EQUAL_WITHIN * high


def _over_sum(values: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(values.values())
    return {name: value / total for name, value in values.items()}


def _over_highest(scores: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Return scores relative to the highest one, and their mean.

    Sums of unscaled scores could overflow.
    """
    high = max(scores.values())
    relative = {name: score / high for name, score in scores.items()}
    return relative, math.fsum(relative.values()) / len(relative)


def spread_excess(
    shares: Mapping[str, float], usable: Mapping[str, float], costs: Mapping[str, int]
) -> dict[str, float]:
    """Cap shares at the usable ones, and spread the excess over the uncapped layers by cost.

    One pass: a layer can end above its usable share.

    Args:
        shares: Share of the budget by module name; they sum to 1.
        usable: Highest usable share by module name; no cap if absent.
        costs: Parameters per rank by module name.
    """
    kept = {name: min(share, usable.get(name, share)) for name, share in shares.items()}
    excess = math.fsum(share - kept[name] for name, share in shares.items())
    others = {name: costs[name] for name, share in shares.items() if kept[name] == share}
    if not others:
        return dict(shares)  # bounds on ranks still apply
    part = excess / sum(others.values())
    return {name: share + part * others.get(name, 0) for name, share in kept.items()}
