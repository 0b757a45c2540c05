"""Arms of the screen: adapters before training.

- `uniform`, `mlp` and the other names in `CHOICES`: fixed ranks with the parameters of rank r.
- `wide`, `ceiling`: LoRA at the ranks of the screen's file.
- `auto`: `DynamicLora` from the ceiling, with a searched budget.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import Optimizer

from benchmarks.allocations import CHOICES, allocate
from benchmarks.arms import FROZEN, Ranks, layer_costs
from benchmarks.screen_tasks import Screen
from benchmarks.screen_training import Adapter, Run
from dynlora import DynamicLora, DynamicLoraConfig

UNIFORM, *ALLOCATIONS = CHOICES
WIDE, CEILING, AUTO = "wide", "ceiling", "auto"


def make_adapter(arm: str, study: Screen, run: Run) -> Adapter:
    """Return the untrained adapter of an arm."""
    base, r = run.task.model.student(), study.r
    costs, fixed = layer_costs(base), partial(lora, **FROZEN)
    if arm in CHOICES:
        return fixed(base, allocate(arm, costs, r), run)
    arms: dict[str, tuple[int, Callable[..., Adapter]]] = {
        WIDE: (study.wide * r, fixed),
        CEILING: (study.ceiling, fixed),
        AUTO: (study.ceiling, partial(lora, budget_end="auto")),
    }
    rank, make = arms[arm]
    return make(base, dict.fromkeys(costs, rank), run)


def lora(base: nn.Module, ranks: Ranks, run: Run, **settings: Any) -> Adapter:
    """Return LoRA with a `DynamicLora` of these settings; with those in `FROZEN`, it is frozen."""
    model = get_peft_model(base, _lora_config(ranks, run))
    return Adapter(model, partial(_control, model, run, settings))


def _lora_config(ranks: Mapping[str, int], run: Run) -> LoraConfig:
    """Return a configuration with one scale for all ranks, and draw its weights from the seed."""
    torch.manual_seed(run.seed)
    highest = max(ranks.values())
    return LoraConfig(
        r=highest,
        lora_alpha=run.scale * highest,
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern={name: run.scale * rank for name, rank in ranks.items()},
    )


def _control(
    model: nn.Module,
    run: Run,
    settings: Mapping[str, Any],
    optimizer: Optimizer,
    validate: Callable[[], float],
) -> DynamicLora:
    config = DynamicLoraConfig(total_steps=run.steps, seed=run.seed, **settings)
    dynamic = DynamicLora(model, optimizer, config, validate=validate)
    if settings == FROZEN:
        dynamic.freeze()
    return dynamic
