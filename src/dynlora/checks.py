"""Checks of a run: each returns None, or raises an error with advice."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from dynlora.adjuster import LayerBounds, check_budget
from dynlora.config import DynamicLoraConfig
from dynlora.distributed import max_over_processes, process_count
from dynlora.errors import BudgetError, ConfigError, EngineError, NonFiniteError, ResumeError
from dynlora.types import RankPlan

_SKIP = "lower the learning rate, or set on_nonfinite='skip' to leave such steps out."
ADVICE: Mapping[str, str] = {
    "gradient": _SKIP,
    "score": _SKIP,
    "weights": (
        "the run has diverged; go back to an earlier checkpoint and lower the learning rate."
    ),
}
"""Advice for non-finite values, by kind."""


def check_pinned(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that every pattern of `pinned` matches a LoRA layer.

    Raises:
        ConfigError: If a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"Each pattern in `pinned` must match a LoRA layer's name, got {pattern!r}, which "
                f"matches none of {len(names)} layers such as {names[0]!r}: begin it with '*'."
            )


def check_room(bounds: Mapping[str, LayerBounds], budget: int, *, min_rank: int) -> None:
    """Check that the budget and the live ranks fit the layers' bounds.

    Args:
        bounds: Bounds by module name, before any observation.
        budget: Parameters to spend.
        min_rank: Lowest rank configured.

    Raises:
        BudgetError: If they do not fit.
    """
    lowest = {
        name: replace(bound, floor=max(bound.floor, min(min_rank, bound.ceiling)))
        for name, bound in bounds.items()
    }
    check_budget(lowest, budget)
    for name, bound in bounds.items():
        if bound.held > bound.ceiling:
            raise BudgetError(
                f"`max_rank` must be at least the live rank of every layer, got {bound.ceiling} "
                f"where {name!r} holds {bound.held}: raise `max_rank`, or lower `LoraConfig.r`."
            )
    low = sum(bound.cost * bound.floor for bound in lowest.values())
    high = sum(bound.cost * bound.ceiling for bound in lowest.values())
    if budget > high:
        raise BudgetError(
            f"A budget of {budget} parameters cannot be spent on {len(bounds)} layers, which hold "
            f"{low} to {high}: raise `max_rank`, let more layers move (`pinned`), or lower "
            "`LoraConfig.r`, which sets the budget."
        )


def check_plan(
    plan: RankPlan,
    ranks: Mapping[str, int],
    costs: Mapping[str, int],
    budget: int,
    *,
    most: Mapping[str, int | None],
) -> None:
    """Check the user's plan.

    Args:
        plan: Rank by module name, for some or all layers.
        ranks: Live rank by module name.
        costs: Parameters per rank by module name.
        budget: Parameters to spend.
        most: Fixed rank of each layer's static tensors by module name; None if not static.

    Raises:
        BudgetError: If the plan names an unknown layer, contains a rank that is not an integer of
            at least 1 or exceeds the static tensors' rank, or exceeds the budget.
    """
    unknown = sorted(set(plan.ranks) - set(ranks))
    if unknown:
        raise BudgetError(
            f"A plan must name LoRA layers of this model, got {unknown[0]!r}: see `ranks`."
        )
    for name, rank in plan.ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, SupportsIndex) or rank < 1:
            raise BudgetError(
                f"The rank of {name!r} must be a whole number of at least 1, got {rank!r}."
            )
        held = most[name]
        if held is not None and rank > held:
            raise BudgetError(
                f"The rank of {name!r} must be at most {held}, at which its tensors are held in "
                f"static mode, got {rank}: lower it, or set a higher `max_rank` from the start."
            )
    planned = {**ranks, **plan.ranks}
    cost = sum(planned[name] * costs[name] for name in planned)
    if cost > budget:
        raise BudgetError(
            f"A plan must cost at most the budget of {budget} parameters, got {cost}: lower some "
            "of its ranks."
        )


def check_same_run(
    state: Mapping[str, Any], *, budget: int, config: DynamicLoraConfig, names: Sequence[str]
) -> None:
    """Check that a saved state belongs to this model and configuration.

    Raises:
        ResumeError: If layers, budget or a setting other than `total_steps` and `mode` differ.
    """
    given = {"budget": budget, **asdict(config)}
    saved = {"budget": state["budget"], **state["config"]}
    for key, value in given.items():
        same = json.dumps(value) == json.dumps(saved.get(key))
        if key not in ("total_steps", "mode") and not same:
            raise ResumeError(
                f"A run resumes with the settings it began with: `{key}` was {saved.get(key)}, "
                f"now {value}. Restore it, or start a new run."
            )
    missing = set(state["layers"]) ^ set(names)
    if missing:
        raise ResumeError(
            f"The saved state must be of this model's LoRA layers, got {len(state['layers'])} "
            f"layers where the model has {len(names)}; {sorted(missing)[0]!r} is in one of them "
            "only. Resume with the model and `target_modules` it was trained with."
        )


def check_reduced(norms: Tensor) -> None:
    """Check that gradients are equal on all processes, by comparing their norms bitwise.

    Args:
        norms: Gradient norm of each layer, in the same order on every process.

    Raises:
        EngineError: If they differ, because each process would then train a different model.
    """
    if not torch.equal(max_over_processes(norms), -max_over_processes(-norms)):
        raise EngineError(
            f"Gradients must be the same on all {process_count()} processes, got others on each: "
            "make `DynamicLora(model, ...)` of the bare model first and "
            "`DistributedDataParallel(model)` then, and give a Trainer its callback when it is "
            "made. With gradient accumulation call `observe()` after the last backward alone."
        )


def check_once(observed: bool) -> None:
    """Check that gradients are read only once per step.

    Raises:
        EngineError: If they were read before: sums of accumulated gradients would seem to agree.
    """
    if observed:
        raise EngineError(
            "Gradients must be read once a step, got a second call of `observe()` before `step()`: "
            "call `step()` after a step that the optimizer leaves out too; "
            "with gradient accumulation make both calls after the last `backward` alone; inside "
            "`accelerator.accumulate(model)` give what `accelerator.prepare` made of the optimizer."
        )


def check_finite(broken: Sequence[str], kind: str, *, step: int, layers: int) -> None:
    """Check that all gradients, scores or weights are finite.

    Args:
        broken: Names of the layers with NaN or infinity.
        kind: Key of `ADVICE`.
        step: Optimizer step for the message.
        layers: Number of all layers.

    Raises:
        NonFiniteError: If `broken` is not empty.
    """
    if broken:
        raise NonFiniteError(
            f"The {kind} of {broken[0]!r} must be finite, got NaN or infinity at step {step} "
            f"(in {len(broken)} of {layers} layers): {ADVICE[kind]}"
        )
