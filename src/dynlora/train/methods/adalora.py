"""Run PEFT's AdaLoRA: its configuration, its call per step, and its penalty."""

from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraLayer
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from dynlora.train.config import JobConfig
from dynlora.train.methods.adapter import common, wrap


def add_adalora(base: Any, config: JobConfig, total_steps: int) -> tuple[Any, list[AdaLoraLayer]]:
    """Return the model with AdaLoRA, and the AdaLoRA layers.

    Raises:
        ConfigError: If no module of the model matches `lora.target_modules`.
    """
    own, r = config.adalora, config.lora.r
    init_r = own.init_r or r + max(1, r // 2)
    first, last = int(own.initial_fraction * total_steps), int(own.final_fraction * total_steps)
    model = wrap(
        base,
        AdaLoraConfig(
            init_r=init_r,
            target_r=r,
            tinit=first,
            tfinal=last,
            deltaT=own.interval,
            total_step=total_steps,
            orth_reg_weight=own.orth_reg_weight,
            **common(base, config) | {"lora_alpha": config.lora.lora_alpha * init_r / r},
        ),
    )
    return model, [module for module in model.modules() if isinstance(module, AdaLoraLayer)]


class AdaLoraCallback(TrainerCallback):
    """Calls AdaLoRA's `update_and_allocate` per optimizer step, before gradients are cleared."""

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Set AdaLoRA's total steps to the Trainer's, which accounts for several processes."""
        kwargs["model"].peft_config["default"].total_step = state.max_steps

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
    """Return the parameter count of AdaLoRA layers without masked ranks.

    One rank uses a row of `lora_A`, a column of `lora_B` and a value of `lora_E`, 0 if masked.
    """
    return sum(
        int(layer.lora_E["default"].count_nonzero()) * (layer.in_features + layer.out_features + 1)
        for layer in layers
    )
