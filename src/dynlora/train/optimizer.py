"""Create the optimizer, if it is not the Trainer's default."""

from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer

from dynlora.train.config import TrainingConfig


def make_optimizer(model: Any, config: TrainingConfig) -> Optimizer | None:
    """Return AdamW with LoRA+'s parameter groups, or None for the Trainer's default.

    Reference:
        Hayou, Ghosh and Yu 2024, "LoRA+", arXiv 2402.12354.
    """
    if config.loraplus_lr_ratio is None:
        return None
    optimizer: Optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=config.learning_rate,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        weight_decay=config.weight_decay,
        fused=True,  # as in the Trainer; torch's default updates tensors one by one
    )
    return optimizer
