"""Arms of the screen and of the comparison that follows it: adapters before training.

- `uniform`, `mlp` and the other names in `CHOICES`: fixed ranks with the parameters of rank r.
- `double`, `wide`, `ceiling`: LoRA at rank 2 r, and at the ranks of the screen's file.
- `wide at LAYER`: LoRA at rank r, and at the rank of `wide` on one layer.
- `auto`: `DynamicLora` from the ceiling, with a searched budget.
- `dynamic`: the defaults of `DynamicLora` at rank r.
- `open`: `dynamic` with events over 95 % of the run, as often as in its first 30 %.
- `falling`: `DynamicLora` from the rank of `wide`, with a budget that falls to that of rank r.
- `adalora`: AdaLoRA with a mean rank of r at the end.
- `eva`: LoRA with EVA's ranks, r in the mean, and its initial directions.
- `eva uniform`: LoRA at rank r with EVA's initial directions.
- `eva dynamic`: the defaults of `DynamicLora` at rank r with EVA's initial directions.
- the names of importance metrics: `dynamic` with that metric.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.last_blocks.allocations import CHOICES, allocate
from benchmarks.last_blocks.frozen_trunk import IGNORED, logits_of
from benchmarks.last_blocks.tasks import Screen
from benchmarks.last_blocks.training import Adapter, Run
from benchmarks.recovery.arms import FROZEN, Ranks, layer_costs
from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.config import METRICS
from dynlora.history import Event
from dynlora.train.config.adapter import AdaLoraSettings
from dynlora.train.methods.adapter import lora_parameters
from dynlora.train.methods.prepare import orthogonality_penalty, unmasked_parameters

UNIFORM, *ALLOCATIONS = CHOICES
DOUBLE, WIDE, CEILING = "double", "wide", "ceiling"
AUTO, DYNAMIC, FALLING, OPEN = "auto", "dynamic", "falling", "open"
ADALORA, EVA = "adalora", "eva"
EVA_UNIFORM, EVA_DYNAMIC = "eva uniform", "eva dynamic"
PREFIX = "base_model.model."
ADALORA_SCALE = 1024
"""Factor of AdaLoRA's scale, whose factors have unit norm; `natural.toml` names its trials."""


def wide_at(layer: str) -> str:
    """Return the name of the arm with rank r, and the rank of `wide` on one layer."""
    return f"{WIDE} at {layer}"


def make_adapter(arm: str, study: Screen, run: Run) -> Adapter:
    """Return the untrained adapter of an arm."""
    base, r, wide = run.task.model.student(), study.r, study.wide * study.r
    costs, fixed = layer_costs(base), partial(lora, **FROZEN)
    if arm in CHOICES:
        return fixed(base, allocate(arm, costs, r), run)
    one_wide = {wide_at(name): dict.fromkeys(costs, r) | {name: wide} for name in costs}
    if arm in one_wide:
        return fixed(base, one_wide[arm], run)
    arms: dict[str, tuple[int, Callable[..., Adapter]]] = {
        DOUBLE: (2 * r, fixed),
        WIDE: (wide, fixed),
        CEILING: (study.ceiling, fixed),
        AUTO: (study.ceiling, partial(lora, budget_end="auto")),
        DYNAMIC: (r, lora),
        OPEN: (r, partial(lora, last_event=0.95, events=15)),
        FALLING: (wide, partial(lora, budget_end=1 / study.wide)),
        ADALORA: (r, adalora),
        EVA: (r, partial(eva, **FROZEN)),
        EVA_UNIFORM: (r, partial(eva, rho=1.0, **FROZEN)),
        EVA_DYNAMIC: (r, partial(eva, rho=1.0)),
    }
    arms |= {metric: (r, partial(lora, importance=metric)) for metric in METRICS}
    rank, make = arms[arm]
    return make(base, dict.fromkeys(costs, rank), run)


def lora(base: nn.Module, ranks: Ranks, run: Run, **settings: Any) -> Adapter:
    """Return LoRA with a `DynamicLora` of these settings; with those in `FROZEN`, it is frozen."""
    model = get_peft_model(base, _lora_config(ranks, run))
    return Adapter(model, partial(_control, model, run, settings))


def eva(base: nn.Module, ranks: Ranks, run: Run, rho: float = 2.0, **settings: Any) -> Adapter:
    """Return LoRA with ranks and initial directions from the inputs of training batches.

    PEFT keeps the sum of ranks and the scale, and multiplies a rank by `rho` at most. Settings are
    those of `lora`.

    Reference:
        Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
        arXiv 2410.07170.
    """
    config = _lora_config(ranks, run, init_lora_weights="eva", eva_config=EvaConfig(rho=rho))
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        model,
        DataLoader([*run.batches()], batch_size=None, collate_fn=run.data.batch),
        forward_fn=lambda model, batch: logits_of(
            model, batch[0], batch[1] != IGNORED, run.task.head
        ),
        prepare_model_inputs_fn=lambda batch, _config: batch[0]["attention_mask"].bool(),
        prepare_layer_inputs_fn=_tokens,
        show_progress_bar=False,
    )
    return Adapter(model, partial(_control, model, run, settings))


def adalora(base: nn.Module, ranks: Ranks, run: Run) -> Adapter:
    """Return AdaLoRA with the schedule of `dynlora train`, and its penalty, which PEFT omits here.

    PEFT adds the penalty only to a loss that the model returns.

    Reference:
        Zhang et al. 2023, "AdaLoRA", arXiv 2303.10512.
    """
    settings, (r,) = AdaLoraSettings(), {*ranks.values()}
    init_r = r + max(1, r // 2)
    torch.manual_seed(run.seed)
    config = AdaLoraConfig(
        init_r=init_r,
        target_r=r,
        lora_alpha=ADALORA_SCALE * run.scale * init_r,
        tinit=round(settings.initial_fraction * run.steps),
        tfinal=round(settings.final_fraction * run.steps),
        deltaT=settings.interval,
        total_step=run.steps,
        target_modules=list(ranks),
    )
    model = get_peft_model(base, config)
    control = AdaLoraControl(model)
    penalty = partial(orthogonality_penalty, control.layers, settings.orth_reg_weight)
    return Adapter(model, lambda _optimizer, _validate: control, penalty)


class AdaLoraControl:
    """Calls AdaLoRA as the loop calls `DynamicLora`."""

    history: Sequence[Event] = ()
    """Empty, because AdaLoRA only masks ranks."""

    def __init__(self, model: Any) -> None:
        """Find the layers of a PEFT model."""
        self._model, self._step = model, 0
        found = {n: m for n, m in model.named_modules() if isinstance(m, AdaLoraLayer)}
        self._names = [name.removeprefix(PREFIX) for name in found]
        self.layers = list(found.values())
        self.peak_parameters = lora_parameters(model)

    @property
    def ranks(self) -> Ranks:
        """Number of unmasked ranks by layer."""
        counts = [int(layer.lora_E["default"].count_nonzero()) for layer in self.layers]
        return dict(zip(self._names, counts, strict=True))

    @property
    def parameters(self) -> int:
        """Parameters of unmasked ranks."""
        return unmasked_parameters(self.layers)

    def observe(self) -> None:
        """Do nothing, because `step` reads the gradients."""

    def step(self) -> None:
        """Count the step, and mask the least important ranks as scheduled."""
        self._step += 1
        self._model.base_model.update_and_allocate(self._step)


def _lora_config(ranks: Mapping[str, int], run: Run, **settings: Any) -> LoraConfig:
    """Return a configuration with one scale for all ranks, and draw its weights from the seed."""
    torch.manual_seed(run.seed)
    highest = max(ranks.values())
    return LoraConfig(
        r=highest,
        lora_alpha=run.scale * highest,
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern={name: run.scale * rank for name, rank in ranks.items()},
        **settings,
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


def _tokens(inputs: tuple[Tensor, ...], mask: Tensor, _name: str) -> Tensor:
    """Return a layer's inputs as rows, without padding."""
    return rows_of(inputs[0], mask)


def rows_of(states: Tensor, mask: Tensor) -> Tensor:
    """Return states without padding, as rows; states that are rows already stay as they are."""
    return states[mask] if states.shape[:-1] == mask.shape else states
