"""The functions that differ between tasks, and the values that they exchange with a job."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from dynlora.adapter_files.base_models import Source
from dynlora.distributed import process_count
from dynlora.train.config import DataConfig, TrainingConfig
from dynlora.train.data.columns import name_classes
from dynlora.train.data.splits import RawSplit, load_splits
from dynlora.train.trainer import Penalty, argument_values, make_sampler, row_lengths

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One split, validated and encoded."""

    inputs: Any  # `datasets.Dataset` of model inputs, with `labels`
    cut: int  # rows truncated to `data.max_length`
    num_labels: int | None
    """Outputs that the model needs for these labels; None if the task has no head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """Both splits of a job."""

    train: Any
    validation: Any
    num_labels: int | None
    cut: Mapping[str, int]  # truncated rows per split
    class_names: Sequence[str] | None = None
    """Class names in class order; None if the data has none."""


def no_head(_model: Any) -> list[str]:
    """Return no names of modules."""
    return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictor:
    """Model, processor and batch size for predictions."""

    model: Any
    processor: Any
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task."""

    peft_type: str | None  # PEFT's `task_type`; None if PEFT has none for the task
    head: Callable[[Any], list[str]] = no_head
    """Returns the names of the task's modules, trained in full beside the adapter."""
    unread: Callable[[Any], list[str]] = no_head
    """Returns the names of modules that do not reach the loss and get no adapter."""
    load_processor: Callable[[Source, DataConfig], Any]
    read_split: Callable[[RawSplit, DataConfig, Any, int | None], Split]
    """Validates and encodes a split with the processor; the number of labels may be None."""
    load_model: Callable[[Source, int | None, Any], Any]
    """Returns the pretrained model with a head for the number of labels, given the processor."""
    begin_head: Callable[[Any, TaskData], None] = lambda _model, _data: None
    """Initializes a new head from the training labels."""
    check_model: Callable[[Any, DataConfig], object] = lambda _model, _config: None
    """Refuses a model whose context is too short for the configured inputs and outputs."""
    make_trainer: Callable[..., Trainer]
    """Returns a Trainer whose evaluations return the metrics in `config.METRICS`. Arguments: values
    of `TrainingArguments`, the processor, and others of the Trainer, `sampler` and `penalty`."""
    own_values: Callable[[TrainingConfig], dict[str, Any]] = lambda _config: {}
    """Returns values for arguments that only the task's Trainer has."""
    predict: Callable[[Predictor, RawSplit, DataConfig], Iterator[dict[str, Any]]]
    """Yields one JSON-ready prediction per row; labels are not needed."""
    answers: Callable[[RawSplit, DataConfig], list[list[str]]] | None = None
    """Returns the right texts per row, if the task writes texts."""


def load_data(task: Task, config: DataConfig, processor: Any) -> TaskData:
    """Load, validate and encode both splits, and warn about truncated rows."""
    train_split, validation_split = name_classes(*load_splits(config), config.label)
    train = task.read_split(train_split, config, processor, config.num_labels)
    validation = task.read_split(validation_split, config, processor, train.num_labels)
    if train.cut + validation.cut:
        logger.warning(
            "%d of %d training and %d of %d validation inputs are longer than "
            "data.max_length=%d tokens and were cut.",
            train.cut, len(train.inputs), validation.cut, len(validation.inputs), config.max_length,
        )  # fmt: skip
    return TaskData(
        train=train.inputs,
        validation=validation.inputs,
        num_labels=train.num_labels,
        cut={"train": train.cut, "validation": validation.cut},
        class_names=train_split.class_names if (train.num_labels or 1) > 1 else None,
    )


def label_names(names: Sequence[str] | None, count: int | None) -> dict[str, Any]:
    """Return a model's `id2label` and `label2id`; empty unless each output has a name."""
    if names is None or len(names) != count:
        return {}
    places = dict(enumerate(names))
    return {"id2label": places, "label2id": {name: place for place, name in places.items()}}


def make_trainer(
    task: Task,
    config: TrainingConfig,
    processor: Any,
    *,
    best_metric: str,
    checkpoints: Path = Path(),
    penalty: Penalty | None = None,
    **parts: Any,
) -> Any:
    """Return the task's Trainer, without writing files or printing.

    `penalty` is added to the loss in training; `parts` are arguments of a `transformers.Trainer`.
    """
    sampler = make_sampler(row_lengths(parts["train_dataset"]), config, process_count())
    with TemporaryDirectory() as nowhere:  # the Trainer creates its folder at once
        values = argument_values(config, best_metric, Path(nowhere)) | task.own_values(config)
        trainer = task.make_trainer(values, processor, sampler=sampler, penalty=penalty, **parts)
    trainer.args.output_dir = str(checkpoints)
    trainer.remove_callback(PrinterCallback)
    return trainer


def warn_of_cut(split: RawSplit, cut: int, limit: int) -> None:
    """Warn of rows of which only `limit` tokens are read."""
    if cut:
        total, source = split.table.num_rows, split.source
        logger.warning("%d of %d rows of %s were cut to %d tokens.", cut, total, source, limit)


def row_logits(
    predictor: Predictor, inputs: Any, collator: Callable[[list[Any]], Any]
) -> Iterator[torch.Tensor]:
    """Yield the float32 logits per row of a `datasets.Dataset` of model inputs, on the CPU."""
    model = predictor.model.eval()
    device = next(model.parameters()).device
    batches: Any = DataLoader(inputs, batch_size=predictor.batch_size, collate_fn=collator)
    for batch in batches:
        moved = {name: value.to(device) for name, value in batch.items()}
        with torch.no_grad():
            logits = model(**moved).logits
        yield from logits.float().cpu()
