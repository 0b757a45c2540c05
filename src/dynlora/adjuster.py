"""Stage 4. Rank adjuster: shares of the budget to whole ranks within bounds, without tensors."""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import SupportsIndex

from dynlora.config import MOST_TIMES_R, DynamicLoraConfig
from dynlora.errors import BudgetError, ConfigError
from dynlora.types import Assessment, LayerShape, RankPlan, is_informative


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBounds:
    """Cost, allowed ranks and present rank of one layer."""

    cost: int
    """Parameters per rank, at least 1."""
    floor: int
    """Lowest rank allowed, at least 1."""
    ceiling: int
    """Highest rank allowed, at least `floor`."""
    held: int
    """Live rank."""


def adjust(
    shares: Mapping[str, float],
    layers: Sequence[LayerShape],
    assessed: Assessment,
    input_limits: dict[str, float],
    config: DynamicLoraConfig,
    *,
    budget: int,
    max_rank: int,
    minima: Mapping[str, int],
) -> tuple[dict[str, int], set[str]]:
    """Plan the ranks of all layers; return also the layers kept from shrinking by their minimum.

    `minima` contains only measured layers, because measuring is slow and only layers that would
    shrink need it. The caller plans, measures these layers, and plans again until all are measured.
    A minimum never exceeds the present rank, so the result is the same as with all minima.
    """
    usable, limits = dict[str, float](), dict[str, float]()
    if is_informative(assessed.scores):
        # A low `max_rank` bounds all layers alike; it must not tighten these limits too.
        at_mean = max(max_rank, MOST_TIMES_R * budget / sum(layer.cost for layer in layers))
        by_gradients = limit_by_directions(assessed.directions, at_mean=at_mean)
        limits = {
            name: min(by_gradients.get(name, math.inf), input_limits.get(name, math.inf))
            for name in by_gradients | input_limits
        }
        usable = {
            layer.name: max(layer.r, by_gradients[layer.name]) * layer.cost / budget
            for layer in layers
            if layer.name in by_gradients
        }
    lowered = assessed.lowered
    costs = {layer.name: layer.cost for layer in layers if layer.name not in lowered}
    wanted = spread_excess(shares, usable, costs)
    free = bound_layers(layers, config, max_rank=max_rank, limits=limits, lowered=lowered)
    bounds = bound_layers(
        layers, config, max_rank=max_rank, minima=minima, limits=limits, lowered=lowered
    )
    ranks = plan_ranks(wanted, bounds, budget=budget, hysteresis=config.hysteresis)
    waits = {
        name
        for name, rank in ranks.items()
        if free[name].floor < bounds[name].floor == rank
        and wanted[name] * budget / bounds[name].cost < rank
    }
    return ranks, waits


def plan_ranks(
    shares: Mapping[str, float],
    layers: Mapping[str, LayerBounds],
    *,
    budget: int,
    hysteresis: float = 0.0,
) -> dict[str, int]:
    """Turn shares into whole ranks within bounds, whose cost is at most `budget`.

    This is the Webster/Sainte-Lague divisor rule, with parameters instead of seats. A layer's k-th
    rank is worth ``w / (k - 1/2)``, with ``w = share / cost``, so ranks become proportional to
    ``w``. Existing ranks are worth ``1 + hysteresis`` times as much, so they move only for a larger
    gain.
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

    The order does not depend on the budget, so a larger budget never spends less. `worth`, per
    parameter, must not increase with the rank.
    """
    check_budget(layers, budget)
    ranks = {name: layer.floor for name, layer in layers.items()}
    left = budget - _range(layers)[0]

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


def lowest_cost(layers: Sequence[LayerShape], config: DynamicLoraConfig) -> int:
    """Return the parameters of all layers at their lowest ranks."""
    return _range(bound_layers(layers, config, max_rank=max(layer.r for layer in layers)))[0]


def plan_cut(
    energies: Mapping[str, Sequence[float]],
    layers: Sequence[LayerShape],
    config: DynamicLoraConfig,
    *,
    budget: int,
) -> dict[str, int]:
    """Return the ranks within `budget` that keep the strongest directions per parameter.

    `energies` are the squared strengths of each layer's directions, strongest first.
    """
    bounds = bound_layers(layers, config, max_rank=max(layer.r for layer in layers))
    held = {name: replace(bound, ceiling=bound.held) for name, bound in bounds.items()}
    return grant_ranks(
        held, budget=budget, worth=lambda name, rank: energies[name][rank - 1] / held[name].cost
    )


def spread_excess(
    shares: Mapping[str, float], usable: Mapping[str, float], costs: Mapping[str, int]
) -> dict[str, float]:
    """Cap shares at the usable ones, and spread the excess over the uncapped layers by cost.

    One pass: a layer can end above its usable share. Layers that are not in `usable` have no cap,
    and layers that are not in `costs` get no excess.
    """
    kept = {name: min(share, usable.get(name, share)) for name, share in shares.items()}
    excess = math.fsum(share - kept[name] for name, share in shares.items())
    others = {name: cost for name, cost in costs.items() if kept[name] == shares[name]}
    if not others:
        return dict(shares)  # bounds on ranks still apply
    part = excess / sum(others.values())
    return {name: share + part * others.get(name, 0) for name, share in kept.items()}


def limit_by_directions(directions: Mapping[str, float], *, at_mean: float) -> dict[str, float]:
    """Return growth limits by module name: ``at_mean * (directions / mean directions) ** 2``."""
    if not directions:
        return {}
    mean = math.fsum(directions.values()) / len(directions)
    return {name: at_mean * (count / mean) ** 2 for name, count in directions.items()}


def bound_layers(
    layers: Sequence[LayerShape],
    config: DynamicLoraConfig,
    *,
    max_rank: int,
    minima: Mapping[str, int] | None = None,
    limits: Mapping[str, float] | None = None,
    lowered: Set[str] = frozenset(),
) -> dict[str, LayerBounds]:
    """Return the bounds of each layer's rank by module name; `lowered` get their lowest rank.

    `minima` are the lowest ranks that `shrink_tolerance` permits; `limits` never force a shrink.
    """
    found = {}
    for layer in layers:
        least = (minima or {}).get(layer.name, 1)
        highest = max_rank
        if layer.name in lowered:
            highest = min(max_rank, max(config.min_rank, least))
        pinned = any(fnmatchcase(layer.name, pattern) for pattern in config.pinned)
        if pinned or not layer.is_trained:
            floor = ceiling = layer.r
        else:
            ceiling = min(max(layer.r, layer.widest), highest)
            # A layer whose present rank is below `min_rank` may keep it.
            floor = min(ceiling, max(min(config.min_rank, layer.r), least))
            limit = (limits or {}).get(layer.name, math.inf)
            if limit < ceiling:
                ceiling = max(floor, min(ceiling, max(layer.r, round(limit))))
        found[layer.name] = LayerBounds(cost=layer.cost, floor=floor, ceiling=ceiling, held=layer.r)
    return found


def check_budget(layers: Mapping[str, LayerBounds], budget: int) -> None:
    """Raise `BudgetError` unless the budget covers every layer's floor."""
    low, high = _range(layers)
    if budget < low:
        raise BudgetError(
            f"A budget of {budget} parameters cannot hold {len(layers)} layers at their lowest "
            f"ranks, which take {low}: lower `min_rank`, or use a budget in [{low}, {high}]."
        )


def _range(layers: Mapping[str, LayerBounds]) -> tuple[int, int]:
    """Return the costs of all floors and of all ceilings."""
    low = sum(layer.cost * layer.floor for layer in layers.values())
    return low, sum(layer.cost * layer.ceiling for layer in layers.values())


def check_room(
    layers: Sequence[LayerShape], config: DynamicLoraConfig, *, budget: int, max_rank: int
) -> None:
    """Check that every pattern of `pinned` matches, and that budget and present ranks fit."""
    for pattern in config.pinned:
        if not any(fnmatchcase(layer.name, pattern) for layer in layers):
            raise ConfigError(
                f"Each pattern in `pinned` must match a LoRA layer's name, got {pattern!r}, which "
                f"matches none of {len(layers)} layers such as {layers[0].name!r}: begin it with "
                "'*'."
            )
    bounds = bound_layers(layers, config, max_rank=max_rank)
    lowest = {
        name: replace(bound, floor=max(bound.floor, min(config.min_rank, bound.ceiling)))
        for name, bound in bounds.items()
    }
    check_budget(lowest, budget)
    left, needed = config.budget_left(budget), _range(lowest)[0]
    if left < needed:
        raise BudgetError(
            f"`budget_end` must leave the lowest ranks' {needed} of {budget} parameters, got "
            f"{config.budget_end:g}, which leaves {left}: raise it to {needed / budget:.3g} or "
            "more, or lower `min_rank`."
        )
    for name, bound in bounds.items():
        if bound.held > bound.ceiling:
            raise BudgetError(
                f"`max_rank` must be at least the present rank of every layer, got {bound.ceiling} "
                f"where {name!r} holds {bound.held}: raise `max_rank`, or lower `LoraConfig.r`."
            )
    low, high = _range(lowest)
    if budget > high:
        raise BudgetError(
            f"A budget of {budget} parameters cannot be spent on {len(bounds)} layers, which hold "
            f"{low} to {high}: raise `max_rank`, let more layers move (`pinned`), or lower "
            "`LoraConfig.r`, which sets the budget."
        )


def check_plan(plan: RankPlan, layers: Sequence[LayerShape], budget: int) -> None:
    """Check the user's plan."""
    unknown = sorted(set(plan.ranks) - {layer.name for layer in layers})
    if unknown:
        raise BudgetError(
            f"A plan must name LoRA layers of this model, got {unknown[0]!r}: see `ranks`."
        )
    for name, rank in plan.ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, SupportsIndex) or rank < 1:
            raise BudgetError(
                f"The rank of {name!r} must be a whole number of at least 1, got {rank!r}."
            )
    cost = sum(plan.ranks.get(layer.name, layer.r) * layer.cost for layer in layers)
    if cost > budget:
        raise BudgetError(
            f"A plan must cost at most the budget of {budget} parameters, got {cost}: lower some "
            "of its ranks."
        )
