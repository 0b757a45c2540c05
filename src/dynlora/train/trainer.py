"""Create the Trainer of a job, with an example order that depends only on seed and epoch.

The order of the Trainer's own length-grouped sampler changes after a resume, and sorts neighbouring
batches by length, which worsens training.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Sampler
from transformers import EvalPrediction, Trainer, TrainingArguments

from dynlora.errors import NonFiniteError
from dynlora.report.wording import lower_is_better
from dynlora.train.config import TrainingConfig

Penalty = Callable[[], Float[Tensor, ""]]  # returns a regulariser of the current weights
SummedLoss = Callable[[Tensor, Tensor], Float[Tensor, ""]]
"""Returns the loss from float32 logits and labels, summed over all labels other than -100."""
Metrics = Callable[[EvalPrediction], dict[str, float]]

SEARCH_ROWS = 500  # most validation rows in a search for the smallest sufficient budget
GROUPED = 50  # most batches whose texts are sorted by length together
GROUPS = 2  # fewest groups, so that batches have other texts in each epoch
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def epoch_batches(
    lengths: Int[Tensor, " examples"], generator: torch.Generator, *, size: int
) -> Iterator[list[int]]:
    """Yield the batches of one epoch: random groups sorted by length, in a random order."""
    order = torch.randperm(len(lengths), generator=generator)
    groups = torch.split(order, size * min(GROUPED, max(1, len(lengths) // (size * GROUPS))))
    ordered = torch.cat([group[lengths[group].argsort(stable=True)] for group in groups])
    batches = torch.split(ordered, size)
    for number in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[number].tolist()


class EpochSampler(Sampler[int]):
    """Samples all examples in an order that depends only on seed and epoch."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int | None, seed: int) -> None:
        """Start at epoch 0; without `batch_size`, examples are not grouped by length."""
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.closed = False  # whether the sampler yields no more examples

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next order; called by the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the example indices of the epoch.

        With groups, the first two batches begin with the two longest examples, so that too little
        memory shows at once: the optimizer's state exists from the second step on.
        """
        if self.closed:
            return iter(())
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        size = self.batch_size
        if size is None:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        lengths = torch.tensor(self.lengths)
        # A smaller batch before others would shift their borders.
        batches = sorted(
            epoch_batches(lengths, generator, size=size), key=lambda batch: len(batch) < size
        )
        order = [*chain(*batches)]
        longest = lengths.argsort(descending=True, stable=True)[:2].tolist()
        for place, example in zip(range(0, len(order), size), longest, strict=False):
            found = order.index(example)
            order[place], order[found] = example, order[place]
        return iter(order)


def mean_loss(summed: SummedLoss) -> Callable[..., Float[Tensor, ""]]:
    """Return a function of outputs, labels and their number in a step to the mean loss over labels.

    Labels of -100 do not count. Without a number, those of the batch are counted. The model's
    `outputs.loss` is not used: AdaLoRA adds its penalty to it, even in evaluation.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Float[Tensor, ""]:
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return summed(outputs.logits.float(), labels) / count

    return loss


def check_finite(loss: Float[Tensor, ""], step: int) -> None:
    """Check that the loss after `step` optimizer steps is finite."""
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss must be finite, got {loss.item()} after {step} optimizer steps: "
            "lower `training.learning_rate`, or set `training.bf16: false` if it overflowed."
        )


class JobTrainer(Trainer):
    """`transformers.Trainer` with an explicit sampler, and evaluation without side effects."""

    def __init__(self, sampler: EpochSampler, penalty: Penalty | None, **kwargs: Any) -> None:
        self.sampler = sampler
        self.penalty = penalty
        super().__init__(**kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the task's finite loss of a batch, in training with the regulariser per step."""
        found: Any = super().compute_loss(*args, **kwargs)
        check_finite(found[0] if isinstance(found, tuple) else found, self.state.global_step)
        if self.penalty is None or not torch.is_grad_enabled():
            return found
        return found + self.penalty() / self.current_gradient_accumulation_steps

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without changing torch's random state, from which data loaders draw.

        Otherwise the evaluation schedule would change training, also after a resume.
        """
        with torch.random.fork_rng():
            metrics: dict[str, float] = Trainer.evaluate(self, *args, **kwargs)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler


def validation_loss(trainer: Any) -> float:
    """Return the loss of the model as it is on fixed validation rows, without records.

    At most `SEARCH_ROWS` of them, because a search evaluates about ten times.
    """
    rows = trainer.get_eval_dataloader(fixed_rows(trainer.eval_dataset, SEARCH_ROWS))
    return float(trainer.evaluation_loop(rows, "Validation").metrics["eval_loss"])


def fixed_rows(rows: Any, limit: int, seed: int = 0) -> Any:
    """Return at most `limit` random rows of a `datasets.Dataset`, equal for equal seeds."""
    return rows.shuffle(seed=seed).select(range(min(limit, len(rows))))


def make_job_trainer(
    values: dict[str, Any],
    processor: Any,
    *,
    loss: SummedLoss,
    metrics: Metrics,
    collate: Callable[[Any], Any],
    **parts: Any,
) -> JobTrainer:
    """Return a Trainer with loss and metrics from logits, and the collator of a processor."""

    def all_metrics(prediction: EvalPrediction) -> dict[str, float]:
        # The Trainer's mean over batches counts the rows twice that fill up the last batches of
        # several processes.
        labels = torch.as_tensor(prediction.label_ids)
        total = loss(torch.as_tensor(prediction.predictions).double(), labels)
        return {"loss": float(total / (labels != -100).sum()), **metrics(prediction)}

    return JobTrainer(
        args=TrainingArguments(**values),
        data_collator=collate(processor),
        compute_loss_func=mean_loss(loss),
        compute_metrics=all_metrics,
        # The logits are the first of several outputs.
        preprocess_logits_for_metrics=lambda made, _: made[0] if isinstance(made, tuple) else made,
        **parts,
    )


def row_lengths(inputs: Any) -> list[int]:
    """Return the length per row in tokens, or 1 for inputs without tokens."""
    if "length" in inputs.column_names:
        return list(inputs["length"])
    if "input_ids" not in inputs.column_names:
        return [1] * len(inputs)
    return [len(ids) for ids in inputs["input_ids"]]


def rows_per_step(config: TrainingConfig, processes: int) -> int:
    """Return the number of rows per optimizer step, over all processes."""
    return config.batch_size * config.gradient_accumulation * processes


def make_sampler(
    lengths: Sequence[int], config: TrainingConfig, processes: int = 1
) -> EpochSampler:
    """Return the sampler for examples of these lengths, as configured."""
    batch = rows_per_step(config, processes) if config.group_by_length else None
    return EpochSampler(lengths, batch_size=batch, seed=config.seed)


def total_steps(rows: int, config: TrainingConfig, processes: int = 1) -> int:
    """Return the optimizer steps of the whole run, as the Trainer counts."""
    if config.max_steps is not None:
        return config.max_steps
    batches = -(-rows // (config.batch_size * processes))
    per_epoch = -(-batches // config.gradient_accumulation)
    return max(1, math.ceil(config.epochs * per_epoch))


def use_bf16(choice: bool | str) -> bool:
    """Return whether to compute in bfloat16; `auto` depends on the training device."""
    if isinstance(choice, bool):
        return choice
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.mps.is_available():
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def argument_values(config: TrainingConfig, best_metric: str, folder: Path) -> dict[str, Any]:
    """Return the values of `TrainingArguments` by name, with its own reporting disabled."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return {
        "output_dir": str(folder),
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
        "activation_checkpointing": config.activation_checkpointing
        or config.gradient_checkpointing,
        "optim": config.optim,
        "neftune_noise_alpha": config.neftune_noise_alpha,
        "bf16": use_bf16(config.bf16),
        # Apple's GPU lacks float64, which rank changes need.
        "use_cpu": device is None or device.type == "mps",
        "eval_strategy": config.eval,
        "eval_steps": config.eval_steps,
        "save_strategy": config.save,
        "save_steps": config.save_steps,
        "save_total_limit": None,  # `Recorder` deletes old checkpoints
        "load_best_model_at_end": config.load_best_model_at_end,
        "metric_for_best_model": best_metric,
        "greater_is_better": not lower_is_better(best_metric),
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "label_names": ["labels"],
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
