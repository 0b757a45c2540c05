"""Section `training`: the Trainer's choices that a fine-tuning job needs."""

import math
from dataclasses import dataclass
from typing import Literal

from dynlora.errors import ConfigError
from dynlora.train.config.checks import require

Interval = Literal["epoch", "steps", "no"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How to train: the Trainer's choices that a fine-tuning job needs."""

    epochs: float = 3.0
    """Passes over the training data, above 0."""
    max_steps: int | None = None
    """Optimizer steps; if given, wins over `epochs`. At least 1."""
    batch_size: int = 32
    """Examples per device and forward pass, at least 1."""
    eval_batch_size: int = 64
    """Examples per device in evaluation, at least 1."""
    gradient_accumulation: int = 1
    """Batches per optimizer step, at least 1."""
    learning_rate: float = 1e-3
    """Highest learning rate, of AdamW, above 0."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: learning rate of every `lora_B` over `learning_rate`, such as 16; null trains all at
    the same rate. Above 0. [loraplus_lr_ratio]"""
    weight_decay: float = 0.0
    """Weight decay of AdamW, at least 0."""
    warmup_ratio: float = 0.06
    """Part of the steps in which the learning rate rises from 0, in [0, 1)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    bf16: Literal["auto"] | bool = "auto"
    """Compute in bfloat16; `auto` does where the GPU, or the CPU (AVX512-BF16, AMX), has it."""
    group_by_length: bool = True
    """Put texts of like length into the same batch, which saves padding."""
    eval: Interval = "epoch"
    """When to evaluate while training."""
    eval_on_start: bool = True
    """Evaluate before training too, so that a run shows what it has gained. [eval_on_start]"""
    eval_steps: int = 100
    """Optimizer steps between evaluations with `eval: steps`, at least 1."""
    save: Interval = "epoch"
    """When to save a checkpoint."""
    save_steps: int = 100
    """Optimizer steps between checkpoints with `save: steps`, at least 1."""
    save_total_limit: int | None = 2
    """Checkpoints kept, the newest ones, and the best with `load_best_model_at_end`; null keeps
    all."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint that did best on validation; needs `eval` and `save` to agree."""
    best_metric: str | None = None
    """What `load_best_model_at_end` compares: a validation metric of the task, such as `loss`; null
    takes the task's main one."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a better `best_metric`; null trains to the
    end. At least 1. [early_stopping_patience]"""
    logging_steps: int = 10
    """Optimizer steps between lines of metrics.jsonl, at least 1."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that also get metrics and ranks, such as `[tensorboard]`; what they write on this
    machine is in the folder `tracking` of the run. [report_to]"""
    seed: int = 0
    """Seed of initial weights, data order and dropout; the same for every method. At least 0 and
    below 2^32."""
    resume: str = "none"
    """`none` starts afresh, `latest` goes on from the newest checkpoint in the output folder,
    `latest-good` from the newest that is not damaged, any other text is the folder of a
    checkpoint."""

    def __post_init__(self) -> None:
        """Check each value, then how they fit together.

        Raises:
            ConfigError: If a value is outside its range or two values contradict each other.
        """
        for key in ("batch_size", "eval_batch_size", "gradient_accumulation", "eval_steps"):
            require(getattr(self, key) >= 1, f"training.{key}", "at least 1", getattr(self, key))
        for key in ("save_steps", "logging_steps"):
            require(getattr(self, key) >= 1, f"training.{key}", "at least 1", getattr(self, key))
        for key in ("max_steps", "save_total_limit", "early_stopping_patience"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"training.{key}", "at least 1", value)
        for key in ("epochs", "learning_rate"):
            value = getattr(self, key)
            require(0 < value < math.inf, f"training.{key}", "a number above 0", value)
        for key in ("weight_decay", "max_grad_norm"):
            value = getattr(self, key)
            require(0 <= value < math.inf, f"training.{key}", "a number of at least 0", value)
        require(0 <= self.seed < 2**32, "training.seed", "in [0, 2^32)", self.seed)
        ratio, plus = self.warmup_ratio, self.loraplus_lr_ratio
        require(0 <= ratio < 1, "training.warmup_ratio", "in [0, 1)", ratio)
        finite = plus is None or 0 < plus < math.inf
        require(finite, "training.loraplus_lr_ratio", "a number above 0", plus)
        if self.early_stopping_patience is not None:
            required = "`epoch` or `steps` with `training.early_stopping_patience`"
            require(self.eval != "no", "training.eval", required, self.eval)
        self._check_best()

    def _check_best(self) -> None:
        if not self.load_best_model_at_end:
            return
        # What did best in an evaluation without a checkpoint could not be kept.
        same_steps = self.eval != "steps" or self.save_steps == self.eval_steps
        if self.eval == "no" or self.eval != self.save or not same_steps:
            raise ConfigError(
                "`training.load_best_model_at_end` needs a checkpoint at every evaluation, got "
                f"eval={self.eval} (eval_steps={self.eval_steps}) and save={self.save} "
                f"(save_steps={self.save_steps}): set `training.eval` and `training.save` both "
                "to `epoch`, or both to `steps` with save_steps the same as eval_steps."
            )
