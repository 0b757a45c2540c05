"""The four methods, each from the base model and the settings to what the Trainer gets.

All take the same path through the job; only what stands here differs between them.
"""

import difflib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora import DynamicLora, DynamicLoraCallback
from dynlora.errors import ConfigError
from dynlora.train.config import JobConfig
from dynlora.train.loss import Penalty
from dynlora.train.recorder import started
from dynlora.train.tasks import TASKS


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What a method hands to the Trainer."""

    model: Any
    """The model to train: PEFT's wrapper, or the base model itself."""
    budget: int
    """Parameters that the method may use for what it adds; all of the model's for `full`."""
    start_parameters: int
    """Parameters in use at the start."""
    live_parameters: Callable[[], int]
    """Counts the parameters in use now: AdaLoRA's without its masked ranks."""
    peak_parameters: Callable[[], int]
    """Counts the most parameters in use at any time so far."""
    callbacks: tuple[TrainerCallback, ...] = ()
    """In the order in which they must run."""
    penalty: Penalty | None = None
    """Regulariser added to the training loss."""
    dynamic: DynamicLoraCallback | None = None
    """The callback that moves ranks, if the method does."""


def prepare(
    base: Any, config: JobConfig, total_steps: int, checkpoint: Path | None = None
) -> Prepared:
    """Return `base` prepared for `config.method`.

    Args:
        base: The pretrained model with the task's head; it is changed in place.
        config: The job.
        total_steps: Optimizer steps of the whole run.
        checkpoint: Folder to resume from; None for a new run.

    Raises:
        ConfigError: If no module of the model matches `lora.target_modules`, or there are too few
            steps for AdaLoRA.
        DynamicLoraError: If the model's LoRA layers cannot follow `config.dynamic`.
    """
    return METHODS[config.method](base, config, total_steps, checkpoint)


def _full(base: Any, _config: JobConfig, _steps: int, _checkpoint: Path | None) -> Prepared:
    return _constant(base, sum(parameter.numel() for parameter in base.parameters()))


def _lora(base: Any, config: JobConfig, _steps: int, _checkpoint: Path | None) -> Prepared:
    model = _wrap(base, LoraConfig(r=config.lora.r, **_common(config)))
    return _constant(model, lora_parameters(model))


def _constant(model: Any, count: int) -> Prepared:
    """Return a method whose number of parameters never changes."""
    return Prepared(
        model=model,
        budget=count,
        start_parameters=count,
        live_parameters=lambda: count,
        peak_parameters=lambda: count,
    )


def _dynamic(base: Any, config: JobConfig, total_steps: int, checkpoint: Path | None) -> Prepared:
    plain = _lora(base, config, total_steps, checkpoint)
    _check_attachable(plain.model, config)
    callback = DynamicLoraCallback(config.dynamic, resume_from=checkpoint)

    def running() -> DynamicLora:
        return started(callback)

    return Prepared(
        model=plain.model,
        budget=plain.budget,
        start_parameters=plain.start_parameters,
        live_parameters=lambda: running().parameters,
        peak_parameters=lambda: running().peak_parameters,
        callbacks=(callback,),
        dynamic=callback,
    )


def _check_attachable(model: Any, config: JobConfig) -> None:
    """Attach and detach once, so that what does not fit is said before a run begins."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    DynamicLora(model, torch.optim.AdamW(trained), config.dynamic).close()


def _adalora(base: Any, config: JobConfig, total_steps: int, _checkpoint: Path | None) -> Prepared:
    own, r = config.adalora, config.lora.r
    init_r = own.init_r or r + max(1, r // 2)
    first, last = int(own.initial_fraction * total_steps), int(own.final_fraction * total_steps)
    if first >= total_steps - last:
        raise ConfigError(
            f"AdaLoRA needs at least one step in which ranks fall, got none in {total_steps} "
            f"steps with {first} before and {last} after: train longer."
        )
    common = _common(config)
    common["lora_alpha"] = config.lora.lora_alpha * init_r / r
    model = _wrap(
        base,
        AdaLoraConfig(
            init_r=init_r,
            target_r=r,
            tinit=first,
            tfinal=last,
            deltaT=own.interval,
            total_step=total_steps,
            orth_reg_weight=own.orth_reg_weight,
            **common,
        ),
    )
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    allocated = lora_parameters(model)
    return Prepared(
        model=model,
        budget=allocated // init_r * r,
        start_parameters=allocated,
        live_parameters=lambda: unmasked_parameters(layers),
        peak_parameters=lambda: allocated,
        callbacks=(AdaLoraCallback(),),
        penalty=lambda: orthogonality_penalty(layers, own.orth_reg_weight),
    )


METHODS: Mapping[str, Callable[[Any, JobConfig, int, Path | None], Prepared]] = {
    "dynamic": _dynamic,
    "lora": _lora,
    "adalora": _adalora,
    "full": _full,
}


def _common(config: JobConfig) -> dict[str, Any]:
    target = config.lora.target_modules
    return {
        "lora_alpha": config.lora.lora_alpha,
        "lora_dropout": config.lora.lora_dropout,
        "target_modules": target if isinstance(target, str) else list(target),
        "task_type": TaskType(TASKS[config.task].peft_type),
    }


def _wrap(base: Any, peft_config: LoraConfig) -> Any:
    wanted = peft_config.target_modules
    if not isinstance(wanted, str):
        _check_targets(base, sorted(wanted))
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.24 for an attribute by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return get_peft_model(base, peft_config)
    except ValueError as error:
        raise ConfigError(
            f"`lora.target_modules` must name modules that PEFT can adapt, got "
            f"{_listed(wanted)} on a {type(base).__name__}, whose {_seen(base)} "
            f"({' '.join(str(error).split())})"
        ) from error


def _check_targets(base: Any, wanted: list[str]) -> None:
    """Check that each ending names some module, as PEFT itself only does for all together."""
    names = [name for name, _ in base.named_modules()]
    for ending in wanted:
        if not any(name == ending or name.endswith(f".{ending}") for name in names):
            near = difflib.get_close_matches(ending, {name.rpartition(".")[2] for name in names}, 1)
            advice = f" The nearest valid name is {near[0]!r}." if near else ""
            raise ConfigError(
                f"`lora.target_modules` must match modules of the model, got {ending!r}, which "
                f"matches none of the {type(base).__name__}, whose {_seen(base)}{advice}"
            )


def _listed(wanted: str | set[str] | list[str]) -> str:
    return wanted if isinstance(wanted, str) else f"[{', '.join(sorted(wanted))}]"


def _seen(base: Any) -> str:
    """Return the endings of the model's linear layers and its most frequent module types."""
    kinds = Counter(type(module).__name__ for module in base.modules())
    endings = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    types = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(6))
    return (
        f"linear layers end in {', '.join(sorted(endings)) or 'nothing: it has none'} and whose "
        f"most frequent module types are {types}."
    )


class AdaLoraCallback(TrainerCallback):
    """Calls AdaLoRA's `update_and_allocate` after each optimizer step, with gradients present."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give AdaLoRA the Trainer's own number of steps, which knows of several processes."""
        kwargs["model"].peft_config["default"].total_step = state.max_steps

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mask the ranks that AdaLoRA's own importance finds least useful."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def orthogonality_penalty(layers: list[AdaLoraLayer], weight: float) -> torch.Tensor:
    """Return `weight` times the mean distance of the factors' Gram matrices from identity.

    Args:
        layers: AdaLoRA's layers.
        weight: At least 0.

    Reference:
        `AdaLoraModel.forward` in peft 0.21, which adds this to `outputs.loss`.
    """
    grams = [
        gram
        for layer in layers
        for a, b in [(layer.lora_A["default"], layer.lora_B["default"])]
        for gram in (a @ a.T, b.T @ b)
    ]
    distances = [torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
    return weight * torch.stack(distances).mean()


def lora_parameters(model: Any) -> int:
    """Return the number of parameters in the model's LoRA layers, as allocated."""
    return sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for kind in module.adapter_layer_names
        for parameter in module.get_submodule(kind).parameters()
    )


def unmasked_parameters(layers: list[AdaLoraLayer]) -> int:
    """Return what AdaLoRA's layers hold without the ranks that it has masked with a zero.

    One rank takes a row of `lora_A`, a column of `lora_B` and a value of `lora_E`.
    """
    return sum(
        int(layer.lora_E["default"].count_nonzero()) * (layer.in_features + layer.out_features + 1)
        for layer in layers
    )
