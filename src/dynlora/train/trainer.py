"""The Trainer as this job sets it up: its arguments, and an order of examples that can resume.

The order depends only on the seed and the epoch. The Trainer's own sampler by length draws from
torch's global random state instead, so that after a resume the examples come in another order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from dynlora.report.wording import lower_is_better
from dynlora.train.config import TrainingConfig
from dynlora.train.loss import Penalty, SummedLoss, TaskLoss
from dynlora.train.task import TrainerParts

Metrics = Callable[[EvalPrediction], dict[str, float]]

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class EpochSampler(Sampler[int]):
    """All examples in an order drawn from the seed and the epoch."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int | None, seed: int) -> None:
        """Prepare the first epoch.

        Args:
            lengths: Length of each example in tokens.
            batch_size: Examples of like length that shall come together; None shuffles freely.
            seed: Any whole number.
        """
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.closed = False
        """Whether no example is to come any more."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; called by the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the epoch's examples."""
        if self.closed:
            return iter(())
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.batch_size is None:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        grouped: list[int] = get_length_grouped_indices(  # type: ignore[no-untyped-call]
            self.lengths, self.batch_size, generator=generator
        )
        return iter(grouped)


class JobTrainer(Trainer):
    """`transformers.Trainer` with a given order of examples, and evaluation without side effect."""

    def __init__(self, sampler: EpochSampler, penalty: Penalty | None, **kwargs: Any) -> None:
        """Take the order and the regulariser; everything else goes to the Trainer."""
        self.sampler = sampler
        self.penalty = penalty
        super().__init__(**kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the task's loss of a batch; in training with the regulariser, once a step."""
        found: Any = super().compute_loss(*args, **kwargs)
        if self.penalty is None or not torch.is_grad_enabled():
            return found
        return found + self.penalty() / self.current_gradient_accumulation_steps

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without a trace in torch's random state (see `without_trace`)."""
        with without_trace():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler


def without_trace() -> AbstractContextManager[None]:
    """Return a context that leaves torch's random state as it was.

    A loader draws from it when it begins: when a run evaluates would else change what it learns,
    and a run resumed from between a checkpoint and an evaluation would differ.
    """
    return torch.random.fork_rng()


def make_job_trainer(
    parts: TrainerParts, *, loss: SummedLoss, metrics: Metrics, collator: Any
) -> JobTrainer:
    """Return the Trainer of a task whose loss and metrics are computed from logits.

    Args:
        parts: What every Trainer is made of.
        loss: The task's loss, summed over labels.
        metrics: From all logits and labels of an evaluation, its metrics by name.
        collator: Makes a batch of rows.
    """
    task_loss = TaskLoss(loss)
    return JobTrainer(
        make_sampler(row_lengths(parts.data.train), parts.training),
        parts.penalty,
        model=parts.model,
        args=training_arguments(parts),
        train_dataset=parts.data.train,
        eval_dataset=parts.data.validation,
        data_collator=collator,
        compute_loss_func=task_loss,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=_logits_alone,
        callbacks=[task_loss, *parts.callbacks],
        optimizers=(parts.optimizer, None),
    )


def _logits_alone(outputs: Any, _: Any) -> Any:
    """Return the logits: first of what a model says, which may be more than they."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def row_lengths(inputs: Any) -> list[int]:
    """Return the length of each row in tokens; rows without tokens are all of length 1."""
    if "input_ids" not in inputs.column_names:
        return [1] * len(inputs)
    return [len(ids) for ids in inputs["input_ids"]]


def make_sampler(lengths: Sequence[int], config: TrainingConfig) -> EpochSampler:
    """Return the order of examples of these lengths that `config` asks for."""
    batch = config.batch_size * config.gradient_accumulation if config.group_by_length else None
    return EpochSampler(lengths, batch_size=batch, seed=config.seed)


def total_steps(rows: int, config: TrainingConfig) -> int:
    """Return the optimizer steps of the whole run on one process, as the Trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    batches = -(-rows // config.batch_size)
    per_epoch = -(-batches // config.gradient_accumulation)
    return max(1, -int(-config.epochs * per_epoch // 1))


def use_bf16(choice: bool | str) -> bool:
    """Return whether to compute in bfloat16; `auto` asks the device that will train."""
    if isinstance(choice, bool):
        return choice
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.mps.is_available():
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _trains_on_cpu() -> bool:
    """Return whether there is no GPU that can train: Apple's has no float64, which ranks need."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is None or device.type == "mps"


def training_arguments(parts: TrainerParts) -> TrainingArguments:
    """Return the Trainer's arguments: nothing is reported anywhere but into the run's folder."""
    return TrainingArguments(**argument_values(parts))


def argument_values(parts: TrainerParts) -> dict[str, Any]:
    """Return the values of `TrainingArguments` by name."""
    config = parts.training
    return {
        "output_dir": str(parts.checkpoints),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "warmup_steps": config.warmup_ratio,
        "lr_scheduler_type": SCHEDULES[config.schedule],
        "max_grad_norm": config.max_grad_norm,
        "bf16": use_bf16(config.bf16),
        "use_cpu": _trains_on_cpu(),
        "eval_strategy": config.eval,
        "eval_steps": config.eval_steps,
        "save_strategy": config.save,
        "save_steps": config.save_steps,
        "save_total_limit": None,  # `CheckpointRecorder` deletes, once the newest is complete
        "load_best_model_at_end": config.load_best_model_at_end,
        "metric_for_best_model": parts.best_metric,
        "greater_is_better": not lower_is_better(parts.best_metric),
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "label_names": ["labels"],
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
