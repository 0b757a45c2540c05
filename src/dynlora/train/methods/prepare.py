"""Prepare a base model for one of the four methods; the rest of a job is shared."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraLayer
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from dynlora import DynamicLora, DynamicLoraCallback
from dynlora.errors import ConfigError
from dynlora.train.config import JobConfig
from dynlora.train.methods.adapter import add_adapter, common, lora_parameters, wrap
from dynlora.train.methods.starts import Factors, first_factors, takes_from_base
from dynlora.train.trainer import Penalty


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Model, parameter counts and callbacks of a method."""

    model: Any
    budget: int
    """Maximum parameters that the method may add; all parameters of the model for `full`."""
    start_parameters: int
    other_parameters: int = 0
    """Trained parameters outside the budget: of a new head, `lora.modules_to_save`, and DoRA's
    magnitudes with `method: dynamic`."""
    unmasked: Callable[[], int] | None = None
    """Returns the parameters without ranks masked by AdaLoRA."""
    callbacks: tuple[TrainerCallback, ...] = ()
    first: Factors | None = None
    """Initial factors taken from the base model, subtracted when the adapter is saved."""
    start_seconds: float = 0.0
    """Time to compute initial adapter weights from the base model or the data."""
    penalty: Penalty | None = None
    dynamic: DynamicLoraCallback | None = None


def prepare(
    base: Any, config: JobConfig, total_steps: int, checkpoint: Path | None = None
) -> Prepared:
    """Return `base`, changed in place, prepared for the method; `checkpoint` is to resume from."""
    prepared = METHODS[config.method](base, config, total_steps, checkpoint)
    trained = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    return replace(prepared, other_parameters=trained - prepared.start_parameters)


def _full(base: Any, _config: JobConfig, _steps: int, _checkpoint: Path | None) -> Prepared:
    count = sum(parameter.numel() for parameter in base.parameters())
    return Prepared(model=base, budget=count, start_parameters=count)


def _lora(base: Any, config: JobConfig, _steps: int, _checkpoint: Path | None) -> Prepared:
    began = time.perf_counter()
    model = add_adapter(base, config)
    count = lora_parameters(model)
    prepared = Prepared(model=model, budget=count, start_parameters=count)
    if not takes_from_base(config.lora):
        return prepared
    first = first_factors(model, str(config.lora.init_lora_weights))
    return replace(prepared, first=first, start_seconds=time.perf_counter() - began)


def _dynamic(base: Any, config: JobConfig, steps: int, checkpoint: Path | None) -> Prepared:
    model = add_adapter(base, config)
    callback = DynamicLoraCallback(config.dynamic, resume_from=checkpoint)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Attach and detach once to find errors before the run begins.
    known = replace(config.dynamic, total_steps=config.dynamic.total_steps or steps)
    dynamic = DynamicLora(model, torch.optim.AdamW(trained), known, validate=float)
    dynamic.close()
    return Prepared(
        model=model,
        budget=dynamic.budget,
        start_parameters=dynamic.parameters,
        callbacks=(callback,),
        dynamic=callback,
    )


def _adalora(base: Any, config: JobConfig, steps: int, _checkpoint: Path | None) -> Prepared:
    own, r = config.adalora, config.lora.r
    init_r = own.init_r or r + max(1, r // 2)
    first, last = int(own.initial_fraction * steps), int(own.final_fraction * steps)
    if first >= steps - last:
        raise ConfigError(
            f"AdaLoRA needs at least one step in which ranks fall, got none in {steps} steps with "
            f"{first} before and {last} after: train longer, or lower `adalora.initial_fraction` "
            "or `adalora.final_fraction`."
        )
    settings = AdaLoraConfig(
        init_r=init_r,
        target_r=r,
        tinit=first,
        tfinal=last,
        deltaT=own.interval,
        total_step=steps,
        orth_reg_weight=own.orth_reg_weight,
        **common(base, config) | {"lora_alpha": config.lora.lora_alpha * init_r / r},
    )
    model = wrap(base, settings)
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    allocated = lora_parameters(model)
    return Prepared(
        model=model,
        budget=allocated // init_r * r,
        start_parameters=allocated,
        unmasked=lambda: unmasked_parameters(layers),
        callbacks=(AdaLoraCallback(),),
        penalty=lambda: orthogonality_penalty(layers, own.orth_reg_weight),
    )


class AdaLoraCallback(TrainerCallback):
    """Calls AdaLoRA's `update_and_allocate` per optimizer step, before gradients are cleared."""

    def on_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Mask the ranks of lowest importance according to AdaLoRA."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def orthogonality_penalty(layers: list[AdaLoraLayer], weight: float) -> torch.Tensor:
    """Return `weight` times the mean distance of the factors' Gram matrices from identity.

    `AdaLoraModel.forward` in peft 0.21 adds this term to `outputs.loss`.
    """
    grams = [
        gram
        for layer in layers
        for a, b in [(layer.lora_A["default"], layer.lora_B["default"])]
        for gram in (a @ a.T, b.T @ b)
    ]
    distances = [torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
    return weight * torch.stack(distances).mean()


def unmasked_parameters(layers: list[AdaLoraLayer]) -> int:
    """Return the parameter count of AdaLoRA layers without ranks whose `lora_E` is 0."""
    return sum(
        int(layer.lora_E["default"].count_nonzero()) * (layer.in_features + layer.out_features + 1)
        for layer in layers
    )


METHODS: Mapping[str, Callable[[Any, JobConfig, int, Path | None], Prepared]] = {
    "dynamic": _dynamic,
    "lora": _lora,
    "adalora": _adalora,
    "full": _full,
}
