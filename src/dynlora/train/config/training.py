"""Section `training`: the settings of the Trainer that a fine-tuning job needs."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dynlora.errors import ConfigError
from dynlora.train.config.values import (
    SECTION,
    AboveZero,
    AtLeastZero,
    BelowOne,
    Count,
    Switch,
    require,
)

Interval = Literal["epoch", "steps", "no"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True, slots=True, config=SECTION)
class TrainingConfig:
    """How to train: the settings of the Trainer that a fine-tuning job needs."""

    epochs: AboveZero = 3.0
    """Passes over the training data."""
    max_steps: Count | None = None
    """Optimizer steps; wins over `epochs`."""
    batch_size: Count = 32
    """Examples per device and forward pass."""
    eval_batch_size: Count = 64
    """Examples per device in evaluation."""
    gradient_accumulation: Count = 1
    """Batches per optimizer step."""
    learning_rate: AboveZero = 1e-3
    """Highest learning rate of AdamW."""
    loraplus_lr_ratio: AboveZero | None = None
    """LoRA+: learning rate of every `lora_B` divided by `learning_rate`, such as 16; null trains
    all factors at the same rate. [loraplus_lr_ratio]"""
    weight_decay: AtLeastZero = 0.0
    """Weight decay of AdamW."""
    warmup_ratio: BelowOne = 0.06
    """Fraction of the steps in which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    max_grad_norm: AtLeastZero = 1.0
    """Norm to which gradients are clipped; 0 disables clipping."""
    bf16: Literal["auto"] | Switch = "auto"
    """Compute in bfloat16. `auto` does so where the GPU, or the CPU (AVX512-BF16, AMX), supports
    it."""
    group_by_length: Switch = True
    """Put texts of similar length into the same batch, which saves padding."""
    eval: Interval = "epoch"
    """When to evaluate during training."""
    eval_on_start: Switch = True
    """Also evaluate before training, so that a run shows its gain. [eval_on_start]"""
    eval_steps: Count = 100
    """Optimizer steps between evaluations with `eval: steps`."""
    save: Interval = "epoch"
    """When to save a checkpoint."""
    save_steps: Count = 100
    """Optimizer steps between checkpoints with `save: steps`."""
    save_total_limit: Count | None = 2
    """Number of checkpoints to keep: the newest, and the best with `load_best_model_at_end`; null
    keeps all."""
    load_best_model_at_end: Switch = False
    """Keep the checkpoint with the best validation metric; `eval` and `save` must agree."""
    best_metric: str | None = None
    """Validation metric that `load_best_model_at_end` compares, such as `loss`; null means the main
    metric of the task."""
    early_stopping_patience: Count | None = None
    """Stop after this many consecutive evaluations without a better `best_metric`; null trains to
    the end. [early_stopping_patience]"""
    logging_steps: Count = 10
    """Optimizer steps between lines of metrics.jsonl."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that also receive metrics and ranks, such as `[tensorboard]`; their local files are
    in the folder `tracking` of the run. [report_to]"""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Seed of initial weights, data order and dropout, the same for every method."""
    resume: str = "none"
    """`none` starts from the beginning, `latest` resumes from the newest checkpoint in the output
    folder, `latest-good` from the newest undamaged one; any other text is the folder of a
    checkpoint."""

    def __post_init__(self) -> None:
        """Check how evaluations and checkpoints fit together."""
        if self.early_stopping_patience is not None:
            required = "`epoch` or `steps` with `training.early_stopping_patience`"
            require(self.eval != "no", "training.eval", required, self.eval)
        # The best model can be kept only if each evaluation has a checkpoint.
        same_steps = self.eval != "steps" or self.save_steps == self.eval_steps
        agree = self.eval != "no" and self.eval == self.save and same_steps
        if self.load_best_model_at_end and not agree:
            raise ConfigError(
                "`training.load_best_model_at_end` needs a checkpoint at every evaluation, but got "
                f"eval={self.eval} (eval_steps={self.eval_steps}) and save={self.save} "
                f"(save_steps={self.save_steps}). Set `training.eval` and `training.save` both "
                "to `epoch`, or both to `steps` with equal save_steps and eval_steps."
            )
