"""Stages 2 and 4 at an event: scores and input statistics in, budget shares and ranks out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynlora.adjuster import MOST_TIMES_R, bound_layers, limit_by_directions, settle_ranks
from dynlora.allocator import allocate_shares, feature_gains, is_informative, spread_excess
from dynlora.config import DynamicLoraConfig
from dynlora.layer_shape import LayerShape
from dynlora.types import Assessment, FeatureStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Shares and ranks by module name."""

    shares: Mapping[str, float]
    """Share of the budget; all shares sum to 1."""
    ranks: Mapping[str, int]
    waits: set[str]
    """Layers that only `shrink_tolerance` keeps from shrinking."""


def plan_event(
    layers: Sequence[LayerShape],
    assessed: Assessment,
    features: Mapping[str, FeatureStats],
    config: DynamicLoraConfig,
    *,
    budget: int,
    max_rank: int,
    measure_lowest: Callable[[Sequence[str]], Mapping[str, int]],
    agree: Callable[[dict[str, int]], dict[str, int]],
) -> Allocation:
    """Return the shares and ranks of all layers.

    Args:
        layers: All layers, with their live ranks.
        assessed: Statistics of the gradients.
        features: Input statistics by module name.
        config: Settings.
        budget: Parameters to spend.
        max_rank: Highest rank of any layer.
        measure_lowest: Returns the lowest rank that `shrink_tolerance` permits, per named layer.
        agree: Replaces a plan by the first process's.

    Raises:
        BudgetError: If the lowest ranks cost more than the budget.
    """
    costs = {layer.name: layer.cost for layer in layers}
    informed = is_informative(assessed.scores)
    lowered = assessed.unreached if informed else frozenset()
    nothing = dict.fromkeys(lowered, 0.0)
    splitting = {name: cost for name, cost in costs.items() if name not in lowered}
    shares = allocate_shares(
        assessed.scores,
        splitting,
        held={layer.name: layer.r for layer in layers},
        gains=_gains(features, config),
        temperature=config.temperature,
        uniform_mix=config.uniform_mix,
    )
    # A low `max_rank` bounds all layers alike; it must not tighten the limits by directions too.
    at_mean = max(max_rank, MOST_TIMES_R * budget / sum(costs.values()))
    by_gradients = limit_by_directions(assessed.directions, at_mean=at_mean) if informed else {}
    by_inputs = _input_limits(features) if informed else {}
    limits = {
        name: min(by_gradients.get(name, math.inf), by_inputs.get(name, math.inf))
        for name in by_gradients | by_inputs
    }
    usable = {
        layer.name: max(layer.r, by_gradients[layer.name]) * layer.cost / budget
        for layer in layers
        if layer.name in by_gradients
    }
    offered = spread_excess(shares, usable, splitting)
    ranks, waits = settle_ranks(
        offered | nothing,
        lambda lowest: bound_layers(
            layers, config, max_rank=max_rank, lowest=lowest, limits=limits, lowered=lowered
        ),
        budget=budget,
        hysteresis=config.hysteresis,
        measure_lowest=measure_lowest,
        agree=agree,
    )
    return Allocation(shares=shares | nothing, ranks=ranks, waits=waits)


def _input_limits(features: Mapping[str, FeatureStats]) -> dict[str, float]:
    """Return the effective rank of each layer's input, if below half the sampled tokens.

    Near the sample size, the sample limits the effective rank.
    """
    found = {name: stats.effective_rank for name, stats in features.items()}
    return {name: rank for name, rank in found.items() if 2 * rank < len(features[name].tokens)}


def _gains(features: Mapping[str, FeatureStats], config: DynamicLoraConfig) -> dict[str, float]:
    spread = config.feature == "variance"
    figures = {n: s.variance if spread else s.effective_rank for n, s in features.items()}
    return feature_gains(figures, config.feature_weight)
