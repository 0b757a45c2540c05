"""Prepare a base model for one of the four methods; the rest of a job is shared."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dynlora import DynamicLora, DynamicLoraCallback
from dynlora.train.config import JobConfig
from dynlora.train.loss import Penalty
from dynlora.train.methods.adalora import (
    AdaLoraCallback,
    add_adalora,
    orthogonality_penalty,
    unmasked_parameters,
)
from dynlora.train.methods.adapter import add_adapter, lora_parameters
from dynlora.train.methods.starts import Factors, first_factors, takes_from_base
from dynlora.train.recorder import started


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Model, parameter counts and callbacks of a method."""

    model: Any
    """The model to train: PEFT's wrapper, or the base model."""
    budget: int
    """Maximum parameters that the method may add; all parameters of the model for `full`."""
    start_parameters: int
    """Parameters in use at the start."""
    live_parameters: Callable[[], int]
    """Returns the parameters in use now, without ranks masked by AdaLoRA."""
    peak_parameters: Callable[[], int]
    """Returns the peak of the parameters in use so far."""
    callbacks: tuple[TrainerCallback, ...] = ()
    """In execution order."""
    first: Factors | None = None
    """Initial factors taken from the base model, subtracted when the adapter is saved."""
    start_seconds: float = 0.0
    """Time to compute initial adapter weights from the base model or the data."""
    penalty: Penalty | None = None
    """Regulariser added to the training loss."""
    dynamic: DynamicLoraCallback | None = None
    """The callback that changes ranks, with `method: dynamic`."""


def prepare(
    base: Any, config: JobConfig, total_steps: int, checkpoint: Path | None = None
) -> Prepared:
    """Return `base`, changed in place, prepared for `config.method`.

    Args:
        base: The pretrained model with the task's head.
        config: The job.
        total_steps: Optimizer steps of the whole run.
        checkpoint: Folder to resume from; None for a new run.

    Raises:
        DynamicLoraError: If the method does not fit the model.
    """
    return METHODS[config.method](base, config, total_steps, checkpoint)


def _full(base: Any, _config: JobConfig, _steps: int, _checkpoint: Path | None) -> Prepared:
    return _constant(base, sum(parameter.numel() for parameter in base.parameters()))


def _lora(base: Any, config: JobConfig, _steps: int, _checkpoint: Path | None) -> Prepared:
    began = time.perf_counter()
    model = add_adapter(base, config)
    constant = _constant(model, lora_parameters(model))
    if not takes_from_base(config.lora):
        return constant
    first = first_factors(model, str(config.lora.init_lora_weights))
    return replace(constant, first=first, start_seconds=time.perf_counter() - began)


def _constant(model: Any, count: int) -> Prepared:
    """Return a method with a constant parameter count."""
    return Prepared(
        model=model,
        budget=count,
        start_parameters=count,
        live_parameters=lambda: count,
        peak_parameters=lambda: count,
    )


def _dynamic(base: Any, config: JobConfig, _steps: int, checkpoint: Path | None) -> Prepared:
    model = add_adapter(base, config)
    callback = DynamicLoraCallback(config.dynamic, resume_from=checkpoint)
    return Prepared(
        model=model,
        budget=_attachable_budget(model, config),
        start_parameters=lora_parameters(model),
        live_parameters=lambda: started(callback).parameters,
        peak_parameters=lambda: started(callback).peak_parameters,
        callbacks=(callback,),
        dynamic=callback,
    )


def _attachable_budget(model: Any, config: JobConfig) -> int:
    """Return the budget, from attaching and detaching once to find errors before the run begins."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dynamic = DynamicLora(model, torch.optim.AdamW(trained), config.dynamic)
    dynamic.close()
    return dynamic.budget


def _adalora(base: Any, config: JobConfig, total_steps: int, _checkpoint: Path | None) -> Prepared:
    model, layers = add_adalora(base, config, total_steps)
    allocated, init_r = lora_parameters(model), model.peft_config["default"].init_r
    return Prepared(
        model=model,
        budget=allocated // init_r * config.lora.r,
        start_parameters=allocated,
        live_parameters=lambda: unmasked_parameters(layers),
        peak_parameters=lambda: allocated,
        callbacks=(AdaLoraCallback(),),
        penalty=lambda: orthogonality_penalty(layers, config.adalora.orth_reg_weight),
    )


METHODS: Mapping[str, Callable[[Any, JobConfig, int, Path | None], Prepared]] = {
    "dynamic": _dynamic,
    "lora": _lora,
    "adalora": _adalora,
    "full": _full,
}
