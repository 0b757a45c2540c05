"""Stage 4. Rank adjuster: shares of the budget to whole ranks, within each layer's bounds.

Pure Python without tensors or models, so that tests can cover every property of a plan.

Ranks are granted one at a time to the layer whose next rank is worth most (the Webster/Sainte-Lague
divisor rule, with parameters instead of seats). A layer's k-th rank is worth ``w / (k - 1/2)``,
with ``w = share / cost``, so ranks become proportional to ``w``. An existing rank is worth
``1 + hysteresis`` times as much, so it moves only for a gain above that margin. The order of grants
does not depend on the budget, so a larger budget never spends less.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dynlora.config import DynamicLoraConfig
from dynlora.errors import BudgetError
from dynlora.layer_shape import LayerShape

MOST_TIMES_R = 8
"""Default `max_rank` as a multiple of `LoraConfig.r`; bounds one layer's part of the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBounds:
    """Cost, allowed ranks and live rank of one layer."""

    cost: int
    """Parameters per rank, at least 1."""
    floor: int
    """Lowest rank allowed, at least 1."""
    ceiling: int
    """Highest rank allowed, at least `floor`."""
    held: int
    """Live rank."""


def plan_ranks(
    shares: Mapping[str, float],
    layers: Mapping[str, LayerBounds],
    *,
    budget: int,
    hysteresis: float = 0.0,
) -> dict[str, int]:
    """Turn shares into whole ranks whose cost is at most `budget`.

    Unspent budget is less than one rank of the cheapest layer below its ceiling.

    Args:
        shares: Share of the budget by module name, >= 0.
        layers: Cost, bounds and live rank by module name.
        budget: Parameters to spend.
        hysteresis: Relative worth added to existing ranks, >= 0.

    Returns:
        Rank by module name, each within its layer's bounds.

    Raises:
        BudgetError: If the floors cost more than `budget`.
    """

    def worth(name: str, rank: int) -> float:
        layer = layers[name]
        value = shares[name] / layer.cost / (rank - 0.5)
        return value * (1 + hysteresis) if rank <= layer.held else value

    return grant_ranks(layers, budget=budget, worth=worth)


def grant_ranks(
    layers: Mapping[str, LayerBounds], *, budget: int, worth: Callable[[str, int], float]
) -> dict[str, int]:
    """Grant ranks one at a time to the layer whose next rank is worth most, up to `budget`.

    Args:
        layers: Cost and bounds by module name.
        budget: Parameters to spend.
        worth: Worth per parameter of a layer's k-th rank, from its name and k >= 1; must not
            increase with k, because ranks are granted in order.

    Returns:
        Rank by module name, each within its layer's bounds.

    Raises:
        BudgetError: If the floors cost more than `budget`.
    """
    check_budget(layers, budget)
    ranks = {name: layer.floor for name, layer in layers.items()}
    left = budget - sum(layer.cost * layer.floor for layer in layers.values())

    def next_grant(name: str) -> tuple[float, int, str]:
        rank = ranks[name] + 1
        return (-worth(name, rank), rank, name)  # ties go to the smaller rank, then to the name

    queue = [next_grant(name) for name, layer in layers.items() if layer.floor < layer.ceiling]
    heapq.heapify(queue)
    while queue:
        _, rank, name = heapq.heappop(queue)
        if layers[name].cost > left:
            continue  # `left` never grows, so later ranks of this layer do not fit either
        ranks[name] = rank
        left -= layers[name].cost
        if rank < layers[name].ceiling:
            heapq.heappush(queue, next_grant(name))
    return ranks


def settle_ranks(
    shares: Mapping[str, float],
    bounds: Callable[[Mapping[str, int]], Mapping[str, LayerBounds]],
    *,
    budget: int,
    hysteresis: float,
    measure_lowest: Callable[[Sequence[str]], Mapping[str, int]],
    agree: Callable[[dict[str, int]], dict[str, int]],
) -> tuple[dict[str, int], set[str]]:
    """Measure lowest ranks only for layers that would shrink, and plan again until none is new.

    The plan is the same as with all lowest ranks, because a lowest rank never exceeds the live one.
    Measuring is the slowest part of planning.

    Args:
        shares: Share of the budget by module name, >= 0.
        bounds: Returns the bounds of all layers, given the lowest ranks measured so far.
        budget: Parameters to spend.
        hysteresis: Relative worth added to existing ranks, >= 0.
        measure_lowest: Returns the lowest rank, at most the live one, of each named layer.
        agree: Replaces a plan by the first process's, so that all measure the same layers.

    Returns:
        Rank by module name, and the layers that only their lowest rank keeps from shrinking.
    """
    free = bounds({})
    lowest: dict[str, int] = {}
    while True:
        within = bounds(lowest)
        ranks = agree(plan_ranks(shares, within, budget=budget, hysteresis=hysteresis))
        asked = [n for n, rank in ranks.items() if rank < free[n].held and n not in lowest]
        if not asked:
            return ranks, waiting(ranks, shares, budget=budget, bounds=within, free=free)
        lowest |= measure_lowest(asked)


def waiting(
    ranks: Mapping[str, int],
    shares: Mapping[str, float],
    *,
    budget: int,
    bounds: Mapping[str, LayerBounds],
    free: Mapping[str, LayerBounds],
) -> set[str]:
    """Return the layers that only `shrink_tolerance` keeps from shrinking.

    Args:
        ranks: Planned rank by module name.
        shares: Share of the budget by module name.
        budget: Parameters to spend.
        bounds: Bounds of the plan.
        free: Bounds without `shrink_tolerance`.
    """
    return {
        name
        for name, rank in ranks.items()
        if free[name].floor < bounds[name].floor == rank
        and shares[name] * budget / bounds[name].cost < rank
    }


def check_budget(layers: Mapping[str, LayerBounds], budget: int) -> None:
    """Check that `budget` covers every layer's floor.

    Raises:
        BudgetError: If it does not; the message states the valid range.
    """
    low = sum(layer.cost * layer.floor for layer in layers.values())
    high = sum(layer.cost * layer.ceiling for layer in layers.values())
    if budget < low:
        raise BudgetError(
            f"A budget of {budget} parameters cannot hold {len(layers)} layers at their lowest "
            f"ranks, which take {low}: lower `min_rank`, or use a budget in [{low}, {high}]."
        )


def default_max_rank(configured: int, held: Iterable[int]) -> int:
    """Return the default `max_rank`: `MOST_TIMES_R` times `LoraConfig.r`, or a higher live rank.

    Args:
        configured: `LoraConfig.r`.
        held: Live ranks.
    """
    return max(MOST_TIMES_R * configured, *held)


def limit_by_directions(directions: Mapping[str, float], *, at_mean: float) -> dict[str, float]:
    """Return growth limits by module name: ``at_mean * (directions / mean directions) ** 2``.

    Args:
        directions: Number of gradient directions by module name, at least 1.
        at_mean: Limit of a layer with the mean number of directions.
    """
    if not directions:
        return {}
    mean = math.fsum(directions.values()) / len(directions)
    return {name: at_mean * (count / mean) ** 2 for name, count in directions.items()}


def bound_layer(
    *,
    cost: int,
    held: int,
    widest: int,
    min_rank: int,
    max_rank: int,
    kept_by_tolerance: int = 1,
    limit: float | None = None,
    pinned: bool = False,
) -> LayerBounds:
    """Return the bounds of one layer's rank at an event.

    Args:
        cost: Parameters per rank.
        held: Live rank.
        widest: Rank of a full update, or of the layer's static tensors.
        min_rank: Lowest rank configured, at least 1; a layer with a lower live rank may keep it.
        max_rank: Highest rank configured.
        kept_by_tolerance: Lowest rank that `shrink_tolerance` permits.
        limit: Growth limit, which never forces a shrink; None for no limit.
        pinned: Whether the rank is fixed.
    """
    if pinned:
        return LayerBounds(cost=cost, floor=held, ceiling=held, held=held)
    ceiling = min(max(held, widest), max_rank)
    floor = min(ceiling, max(min(min_rank, held), kept_by_tolerance))
    if limit is not None:
        ceiling = max(floor, min(ceiling, max(held, round(limit))))
    return LayerBounds(cost=cost, floor=floor, ceiling=ceiling, held=held)


def bound_layers(
    layers: Sequence[LayerShape],
    config: DynamicLoraConfig,
    *,
    max_rank: int,
    lowest: Mapping[str, int] | None = None,
    limits: Mapping[str, float] | None = None,
    lowered: Set[str] = frozenset(),
) -> dict[str, LayerBounds]:
    """Return the bounds of each layer's rank, by module name.

    Args:
        layers: All layers of the adapter.
        config: Source of `min_rank` and `pinned`.
        max_rank: Highest rank of any layer.
        lowest: Lowest rank that `shrink_tolerance` permits, by module name; 1 if absent.
        limits: Growth limit by module name; none if absent.
        lowered: Layers that get their lowest rank.
    """
    least = {layer.name: (lowest or {}).get(layer.name, 1) for layer in layers}
    return {
        layer.name: bound_layer(
            cost=layer.cost,
            held=layer.r,
            widest=layer.widest,
            min_rank=config.min_rank,
            max_rank=min(max_rank, max(config.min_rank, least[layer.name]))
            if layer.name in lowered
            else max_rank,
            kept_by_tolerance=least[layer.name],
            limit=(limits or {}).get(layer.name),
            pinned=not layer.is_trained
            or any(fnmatchcase(layer.name, pattern) for pattern in config.pinned),
        )
        for layer in layers
    }
