"""Stage 2. Weight allocator: importance scores to shares of the budget, and to layer weights.

Pure Python on purpose: no tensors and no model, so every property of the shares can be tested.
"""

import math
from collections.abc import Mapping

LAYER_WEIGHT_RANGE = (0.5, 2.0)
"""Layer weights are clamped to this range: no layer learns at a rate far from the others'."""

_EQUAL_WITHIN = 1e-9
"""Scores whose relative spread is at most this are taken as equal (float rounding)."""


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

    Scores are per parameter, so a layer's share grows with its cost. Scores that tell no layers
    apart (missing, all zero or all equal) give ``share ∝ cost * held``, whatever the gains are:
    every layer keeps its rank, and unspent budget goes to the layers in proportion to their ranks.

    Args:
        scores: Importance per parameter by module name, finite and >= 0. A layer without a score
            counts as average.
        costs: Parameters that one rank takes, by module name; the layers to split between.
        held: Live rank by module name, at least 1.
        gains: Factor on a layer's score from its input features, >= 0; 1 where absent.
        temperature: Above 0; below 1 sharpens the differences, above 1 flattens them.
        uniform_mix: Part of the budget spread evenly over the layers' ranks, in ``[0, 1]``.

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
        names: The layers to weigh; one without a score gets weight 1.
    """
    if not is_informative(scores):
        return dict.fromkeys(names, 1.0)
    low, high = LAYER_WEIGHT_RANGE
    relative, mean = _over_highest(scores)
    return {name: min(max(relative.get(name, mean) / mean, low), high) for name in names}


def feature_gains(figures: Mapping[str, float], feature_weight: float) -> dict[str, float]:
    """Return each layer's gain: a figure of its input over the mean one, to a power.

    Args:
        figures: Effective rank or variance of the layer's input by module name, >= 0.
        feature_weight: The power, in ``[0, 1]``; 0 gives 1 everywhere.
    """
    if not any(figures.values()):
        return {}
    mean = math.fsum(figures.values()) / len(figures)
    return {name: (figure / mean) ** feature_weight for name, figure in figures.items()}


def is_informative(scores: Mapping[str, float]) -> bool:
    """Return whether scores tell any two layers apart."""
    if not scores:
        return False
    low, high = min(scores.values()), max(scores.values())
    return high - low > _EQUAL_WITHIN * high


def _over_sum(values: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(values.values())
    return {name: value / total for name, value in values.items()}


def _over_highest(scores: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Return informative scores over the highest one, and their mean.

    Sums of the scores themselves could overflow, or depend on the order of the layers.
    """
    high = max(scores.values())
    relative = {name: score / high for name, score in scores.items()}
    return relative, math.fsum(relative.values()) / len(relative)


def spread_excess(
    shares: Mapping[str, float], usable: Mapping[str, float], costs: Mapping[str, int]
) -> dict[str, float]:
    """Spread evenly over the other layers what layers are offered beyond what they have use for.

    That one layer matters more than it can use says nothing of the others. In one pass, whatever
    else bounds them.

    Args:
        shares: Share of the budget by module name; they sum to 1.
        usable: Highest share that a layer has use for, by module name; no limit if not named.
        costs: Parameters that one rank takes, by module name.
    """
    kept = {name: min(share, usable.get(name, share)) for name, share in shares.items()}
    excess = math.fsum(share - kept[name] for name, share in shares.items())
    others = {name: costs[name] for name, share in shares.items() if kept[name] == share}
    if not others:
        return dict(shares)  # the ranks' bounds alone decide
    part = excess / sum(others.values())
    return {name: share + part * others.get(name, 0) for name, share in kept.items()}
