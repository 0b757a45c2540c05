"""Control arms: how ranks, scales and learning rates of a student differ from plain LoRA.

An arm is a `Plan`, and `train` follows it in one loop. Most arms are made from a reference: the
recorded ranks of the `dynamic` run with the same task, rank and seed.

- `lora`: rank r everywhere.
- `dynamic`: the defaults of `DynamicLora`. Its run is the reference of the other arms.
- `random`: `DynamicLora` with random scores.
- `refresh`: rank r everywhere. At each event of the reference, as many directions as grew there are
  dropped and grown in place, in layers drawn at random.
- `pace`: rank r everywhere. Each layer's learning rate is multiplied by its final rank in the
  reference over r.
- `pattern`: the final ranks of the reference from the start, at one scale for all layers.
- `pattern_slow`: the same ranks with a scale inversely proportional to the rank.
- `permuted`: the ranks of the reference after each of its events, exchanged between layers of equal
  parameters per rank.
- `falling`: `DynamicLora` from rank 4 r, with a budget that falls to that of rank r.
- `falling_held`: the same cuts, without moving ranks.
- `rule`: rank 1 for queries and keys, and their free budget for the last feed-forward output.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from transformers import get_linear_schedule_with_warmup

from benchmarks.recovery.batches import training_batches
from benchmarks.recovery.student import BATCH, Recovery, loss_of
from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.types import RankPlan

Ranks = dict[str, int]
Schedule = dict[int, Ranks]
"""Ranks after each event of a run, by step."""

WARMUP = 0.06
"""Part of the run in which the learning rate rises."""
MAX_GRAD_NORM = 1.0
FROZEN: dict[str, Any] = {"importance": "uniform"}
"""Settings of `DynamicLora` for arms without events, which freeze it before the first step."""
FOLLOWING: dict[str, Any] = {"importance": "uniform", "pinned": ("*",)}
"""Settings of `DynamicLora` with which its events sample inputs and move no rank."""
REFERRING = ("refresh", "pace", "pattern", "pattern_slow", "permuted")
"""Arms made from a reference."""
ARMS = ("lora", "dynamic", *REFERRING, "rule", "random", "falling", "falling_held")
WIDE = 4
"""Rank at the start over r, in arms with a falling budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Values that all arms share."""

    r: int
    learning_rate: float
    scale: float
    """Factor of each layer's adapter, unless the plan changes it."""
    seed: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Differences of an arm from plain LoRA."""

    ranks: Ranks = field(default_factory=dict)
    """Rank at the start, by layer; `wide` times r for other layers."""
    wide: int = 1
    scales: dict[str, float] = field(default_factory=dict)
    """Multiplier of the scale by layer; 1 for other layers."""
    rates: dict[str, float] = field(default_factory=dict)
    """Multiplier of the learning rate by layer; 1 for other layers."""
    config: dict[str, Any] = field(default_factory=lambda: dict(FROZEN))
    """Settings of `DynamicLora`."""
    schedule: Schedule = field(default_factory=dict)
    """Ranks to set, by step."""
    refreshed: dict[int, int] = field(default_factory=dict)
    """Number of directions to drop and grow in place, by step."""


def make_plan(
    arm: str, costs: Mapping[str, int], r: int, *, seed: int, reference: Schedule | None
) -> Plan:
    """Return the plan of an arm.

    Args:
        arm: Name in `ARMS`.
        costs: Parameters per rank by layer, in the model's order.
        r: Rank of plain LoRA.
        seed: Seed of the permutation.
        reference: Ranks after each event of the reference; only for arms in `REFERRING`.
    """
    if arm not in REFERRING:
        return _plan_alone(arm, costs, r)
    if reference is None:
        raise ValueError(f"`reference` must be given for the arm {arm!r}, but got None.")
    final = reference[max(reference)]
    match arm:
        case "refresh":
            counts = grown_directions(reference, dict.fromkeys(costs, r))
            return Plan(config=FOLLOWING, refreshed=counts)
        case "pace":
            return Plan(rates={name: rank / r for name, rank in final.items()})
        case "pattern":
            return Plan(ranks=final)
        case "pattern_slow":
            return Plan(ranks=final, scales={name: r / rank for name, rank in final.items()})
        case _:
            source = permute_layers(costs, seed)
            schedule = {
                step: {name: ranks[source[name]] for name in costs}
                for step, ranks in reference.items()
            }
            return Plan(config=FOLLOWING, schedule=schedule)


def _plan_alone(arm: str, costs: Mapping[str, int], r: int) -> Plan:
    match arm:
        case "lora":
            return Plan()
        case "dynamic":
            return Plan(config={})
        case "random":
            return Plan(config={"importance": "random"})
        case "falling":
            return Plan(wide=WIDE, config={"budget_end": 1 / WIDE})
        case "falling_held":
            return Plan(wide=WIDE, config={"budget_end": 1 / WIDE, "importance": "uniform"})
        case "rule":
            return Plan(ranks=rule_of_thumb(costs, r))
    raise ValueError(f"`arm` must be one of {', '.join(ARMS)}, but got {arm!r}.")


def grown_directions(reference: Schedule, start: Ranks) -> dict[int, int]:
    """Return the number of directions that grew at each event."""
    steps = sorted(reference)
    before = [start, *(reference[step] for step in steps)]
    return {
        step: sum(max(0, new[name] - old[name]) for name in new)
        for step, (old, new) in zip(steps, pairwise(before), strict=True)
    }


def permute_layers(costs: Mapping[str, int], seed: int) -> dict[str, str]:
    """Return the layer whose ranks each layer gets, of equal cost and never itself.

    Each group of layers of equal cost becomes one random cycle.
    """
    groups: dict[int, list[str]] = defaultdict(list)
    for name, cost in costs.items():
        groups[cost].append(name)
    generator = torch.Generator().manual_seed(seed)
    source: dict[str, str] = {}
    for names in groups.values():
        order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        source |= dict(zip(order, [*order[1:], order[0]], strict=True))
    return source


def rule_of_thumb(costs: Mapping[str, int], r: int) -> Ranks:
    """Return rank 1 for queries and keys, and a higher rank for the last feed-forward output."""
    low = [name for name in costs if name.endswith((".query", ".key"))]
    last = [name for name in costs if name.endswith(".output.dense") and "attention" not in name][
        -1
    ]
    free = sum((r - 1) * costs[name] for name in low)
    return dict.fromkeys(costs, r) | dict.fromkeys(low, 1) | {last: r + free // costs[last]}


def layer_costs(model: nn.Module) -> dict[str, int]:
    """Return the parameters per rank of every linear layer."""
    return {
        name: layer.in_features + layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


def add_adapter(base: nn.Module, plan: Plan, setting: Setting) -> nn.Module:
    """Return the model with the adapter of a plan; its initial weights depend on the seed."""
    costs = layer_costs(base)
    r = plan.wide * setting.r
    ranks = dict.fromkeys(costs, r) | plan.ranks
    alphas = {name: setting.scale * plan.scales.get(name, 1.0) * ranks[name] for name in costs}
    torch.manual_seed(setting.seed)
    config = LoraConfig(
        r=r,
        lora_alpha=setting.scale * r,
        target_modules=list(costs),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    model: nn.Module = get_peft_model(base, config)
    return model


def make_optimizer(model: nn.Module, plan: Plan, learning_rate: float) -> Optimizer:
    """Return AdamW with one parameter group per learning rate."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
            groups[plan.rates.get(layer, 1.0)].append(parameter)
    return AdamW(
        [{"params": p, "lr": learning_rate * rate} for rate, p in groups.items()], weight_decay=0.0
    )


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained student."""

    model: nn.Module
    dynamic: DynamicLora
    """Its controller, whose history has all events."""
    refreshed: int
    """Number of directions that were dropped and grown in place."""


def train(task: Recovery, plan: Plan, setting: Setting) -> Trained:
    """Train a student as planned."""
    model = add_adapter(task.student(), plan, setting).train()
    optimizer = make_optimizer(model, plan, setting.learning_rate)
    warmup = round(WARMUP * setting.steps)
    rates = get_linear_schedule_with_warmup(optimizer, warmup, setting.steps)
    config = DynamicLoraConfig(total_steps=setting.steps, seed=setting.seed, **plan.config)
    dynamic = DynamicLora(model, optimizer, config)
    if plan.config == FROZEN:
        dynamic.freeze()
    split = task.splits["train"]
    lengths = split.texts.lengths
    batches = training_batches(lengths, size=BATCH, seed=setting.seed, steps=setting.steps)
    refreshed = 0
    for step, rows in enumerate(batches, start=1):
        loss_of(model, split, rows).backward()
        clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        dynamic.observe()
        optimizer.step()
        refreshed += _follow(dynamic, plan, step, seed=setting.seed)
        dynamic.step()
        rates.step()
        optimizer.zero_grad()
    return Trained(model, dynamic, refreshed)


def _follow(dynamic: DynamicLora, plan: Plan, step: int, *, seed: int) -> int:
    """Change ranks as planned, before the controller's own event restarts the input samples.

    Returns:
        The number of directions that were dropped and grown in place.
    """
    if step in plan.schedule:
        dynamic.apply(RankPlan(step=step, ranks=plan.schedule[step]))
    count = plan.refreshed.get(step, 0)
    return refresh(dynamic, count, step=step, seed=seed) if count else 0


def refresh(dynamic: DynamicLora, count: int, *, step: int, seed: int) -> int:
    """Drop weak directions and grow new ones in the same layers; return their number.

    Layers are drawn at random, in turns. A layer keeps at least one direction, and drops no more
    than the tolerance of the controller permits.
    """
    adapters, features = dynamic._adapters, dynamic._analyzer.stats()
    ranks = dict(dynamic.ranks)
    tolerance = dynamic.config.shrink_tolerance
    lowest = adapters.lowest_ranks(list(ranks), features, tolerance=tolerance)
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    lowered = dict(ranks)
    for _, name in zip(range(count), _turns(lowered, lowest, generator), strict=False):
        lowered[name] -= 1
    for wanted in (lowered, ranks):
        adapters.apply(RankPlan(step=step, ranks=wanted), features, seed=seed)
    return sum(ranks.values()) - sum(lowered.values())


def _turns(ranks: Ranks, lowest: Ranks, generator: torch.Generator) -> Iterator[str]:
    """Yield layers that can still drop a direction, each once per turn, until none can."""
    names = list(ranks)
    while able := [name for name in names if ranks[name] > max(1, lowest[name])]:
        for place in torch.randperm(len(able), generator=generator).tolist():
            yield able[place]


def schedule_of(dynamic: DynamicLora) -> Schedule:
    """Return the ranks after each event of a run."""
    return {
        event.step: {name: layer.rank_after for name, layer in event.layers.items()}
        for event in dynamic.history
    }
