"""What differs between tasks: a record of functions. Everything else in a job is the same.

Each file of `tasks` holds one task, or some that share their inputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from dynlora.train.config import DataConfig, TrainingConfig
from dynlora.train.head import no_head
from dynlora.train.loss import Penalty
from dynlora.train.pretrained import Source
from dynlora.train.sources import RawSplit


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One split, checked and ready for the model."""

    inputs: Any
    """`datasets.Dataset` of the model's inputs, with `labels`."""
    cut: int
    """Rows longer than `data.max_length`, which were cut."""
    num_labels: int | None
    """Outputs that the model needs for these labels; None where the task has no head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """Both splits of a job."""

    train: Any
    """`datasets.Dataset`, as `Split.inputs`."""
    validation: Any
    """As `train`."""
    num_labels: int | None
    cut: Mapping[str, int]
    """Rows that were cut, by split."""
    class_names: Sequence[str] | None = None
    """What each class is called, in the order of their numbers, where the data says so."""


def leave_head(_model: Any, _data: TaskData) -> None:
    """Leave a model's head as it is."""


def accept_model(_model: Any, _config: DataConfig) -> None:
    """Accept any model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerParts:
    """What a task's Trainer is made of."""

    model: Any
    training: TrainingConfig
    best_metric: str
    """Which validation metric `load_best_model_at_end` compares."""
    checkpoints: Path
    data: TaskData
    processor: Any
    penalty: Penalty | None
    """Added to the loss in training."""
    callbacks: Sequence[TrainerCallback]
    """In the order in which they must run."""
    optimizer: Optimizer | None
    """None leaves the choice to the Trainer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictor:
    """What predictions are made with."""

    model: Any
    processor: Any
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task."""

    peft_type: str | None
    """PEFT's `task_type`; None where PEFT has none for the task."""
    head: Callable[[Any], list[str]] = no_head
    """Names of the model's modules that are for this task: trained whole beside the adapter."""
    unread: Callable[[Any], list[str]] = no_head
    """Names of the model's modules that do not reach the loss: no adapter is put inside."""
    load_processor: Callable[[Source, DataConfig], Any]
    """The tokenizer or image processor."""
    read_split: Callable[[RawSplit, DataConfig, Any, int | None], Split]
    """Checks a split's columns and makes model inputs of them, given the processor and the number
    of labels if that is known."""
    load_model: Callable[[Source, int | None, Any], Any]
    """The pretrained model with a head for that many labels, given the processor."""
    begin_head: Callable[[Any, TaskData], None] = leave_head
    """Lets a new head begin where the training rows' labels are."""
    check_model: Callable[[Any, DataConfig], None] = accept_model
    """Refuses a model that could be trained, but not asked what the configuration says."""
    make_trainer: Callable[[TrainerParts], Trainer]
    """A Trainer whose evaluations return the metrics in `config.METRICS`."""
    predict: Callable[[Predictor, RawSplit, DataConfig], Iterator[dict[str, Any]]]
    """What the model says to each row of a split, whose labels are not needed; JSON-ready."""
