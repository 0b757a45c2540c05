"""Stage 4. Rank adjuster: shares of the budget to whole ranks, within each layer's bounds.

Pure Python on purpose: no tensors and no model, so every property of a plan can be tested.

Ranks are granted one at a time to the layer where the next one is worth most. A layer's k-th rank
is worth ``w / (k - 1/2)``, with ``w = share / cost``: the first direction of a layer is worth more
than its tenth, and ranks come out proportional to ``w`` (the Webster/Sainte-Lague divisor rule, in
parameters instead of seats). A rank that a layer already holds is worth ``1 + hysteresis`` times
as much, so it moves only for a gain that exceeds the loss by that margin. Because the order of the
grants does not depend on the budget, a larger budget never spends less.
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
"""How much of the budget one layer may take: what concentrated needs ask for, and not all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBounds:
    """What the adjuster knows of one layer."""

    cost: int
    """Parameters that one rank takes, at least 1."""
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

    What is left unspent is less than one rank of the cheapest layer below its ceiling.

    Args:
        shares: Share of the budget by module name, >= 0.
        layers: Cost, bounds and live rank by module name.
        budget: Parameters to spend.
        hysteresis: Relative worth added to a rank that is already held, >= 0.

    Returns:
        Rank by module name, each within its layer's bounds.

    Raises:
        BudgetError: If even the floors cost more than `budget`.
    """

    def worth(name: str, rank: int) -> float:
        layer = layers[name]
        value = shares[name] / layer.cost / (rank - 0.5)
        return value * (1 + hysteresis) if rank <= layer.held else value

    return grant_ranks(layers, budget=budget, worth=worth)


def grant_ranks(
    layers: Mapping[str, LayerBounds], *, budget: int, worth: Callable[[str, int], float]
) -> dict[str, int]:
    """Grant ranks one at a time to the layer where the next is worth most, up to `budget`.

    Args:
        layers: Cost and bounds by module name.
        budget: Parameters to spend.
        worth: What a layer's k-th rank is worth per parameter, for a name and k >= 1; it must not
            rise with k, or a layer's later ranks would never be reached in time.

    Returns:
        Rank by module name, each within its layer's bounds.

    Raises:
        BudgetError: If even the floors cost more than `budget`.
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
            continue  # what does not fit now never will: `left` only falls
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
    """Return the plan that all lowest ranks give, from those of layers that would shrink alone.

    The others bind nothing, since a lowest rank is at most the one held; and to measure them is the
    dearest part of planning.

    Args:
        shares: Share of the budget by module name, >= 0.
        bounds: From the lowest ranks known, by module name, to what is known of each layer.
        budget: Parameters to spend.
        hysteresis: Relative worth added to a rank that is already held, >= 0.
        measure_lowest: Measures the lowest rank, at most the live one, of the layers named.
        agree: Makes a plan that of all processes: which layers are measured follows from it.

    Returns:
        The ranks by module name, and the layers that nothing but a lowest rank keeps so high.
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
    """Return the layers that hold a rank only because dropping it would cost too much.

    Args:
        ranks: As planned, by module name.
        shares: Share of the budget by module name.
        budget: Parameters to spend.
        bounds: Those that the plan was made within.
        free: Those without any tolerance.
    """
    return {
        name
        for name, rank in ranks.items()
        if free[name].floor < bounds[name].floor == rank
        and shares[name] * budget / bounds[name].cost < rank
    }


def check_budget(layers: Mapping[str, LayerBounds], budget: int) -> None:
    """Check that `budget` can pay at least every layer's floor.

    Raises:
        BudgetError: If it cannot; the message gives the range that can be spent.
    """
    low = sum(layer.cost * layer.floor for layer in layers.values())
    high = sum(layer.cost * layer.ceiling for layer in layers.values())
    if budget < low:
        raise BudgetError(
            f"A budget of {budget} parameters cannot hold {len(layers)} layers at their lowest "
            f"ranks, which take {low}: lower `min_rank`, or use a budget in [{low}, {high}]."
        )


def default_max_rank(configured: int, held: Iterable[int]) -> int:
    """Return the highest rank of any layer where none is configured.

    Args:
        configured: `LoraConfig.r`, of which it is `MOST_TIMES_R` times.
        held: Live ranks; the highest may stay.
    """
    return max(MOST_TIMES_R * configured, *held)


def limit_by_directions(directions: Mapping[str, float], *, at_mean: float) -> dict[str, float]:
    """Return by module name the rank above which a layer shall not grow.

    It follows the square of the ratio of the layer's number of directions to the mean one.

    Args:
        directions: In how many directions each layer's gradients point, at least 1.
        at_mean: Limit of a layer whose gradients point in as many as the mean.
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
    """Return the ranks that one layer may take at an event.

    Args:
        cost: Parameters that one rank takes.
        held: Live rank.
        widest: Rank of a full update of the layer, or what its tensors have room for.
        min_rank: Lowest rank configured, at least 1; a layer that holds less may keep that.
        max_rank: Highest rank configured.
        kept_by_tolerance: Lowest rank that does not lose more of the output than tolerated.
        limit: Rank above which the layer shall not grow. It never forces a shrink. None where it
            shall not bind.
        pinned: Whether the rank must not move.
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
    """Return by module name the ranks that each layer may take.

    Args:
        layers: All layers of the adapter.
        config: Its `min_rank` and `pinned` are read.
        max_rank: Highest rank of any layer.
        lowest: Lowest rank by module name that loses no more of the output than tolerated.
        limits: Rank above which a layer shall not grow, by module name, where it shall bind.
        lowered: Names of the layers that get their lowest rank.
    """
    least = {layer.name: (lowest or {}).get(layer.name, 1) for layer in layers}
    return {
        layer.name: bound_layer(
            cost=layer.cost,
            held=layer.r,
            widest=layer.widest,
            min_rank=config.min_rank,
            max_rank=max(config.min_rank, least[layer.name]) if layer.name in lowered else max_rank,
            kept_by_tolerance=least[layer.name],
            limit=(limits or {}).get(layer.name),
            pinned=not layer.is_trained
            or any(fnmatchcase(layer.name, pattern) for pattern in config.pinned),
        )
        for layer in layers
    }
