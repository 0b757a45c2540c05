"""Evaluation of a finished run on any labelled rows, with the Trainer used in training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import EvalPrediction, PrinterCallback, Trainer

from dynlora.train.config import METRICS
from dynlora.train.data.splits import RawSplit
from dynlora.train.finished_run import FinishedRun
from dynlora.train.task import Split, TaskData, TrainerParts

ONE_CLASS_A_ROW = ("sequence_classification", "image_classification")
"""Tasks with a single class per row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCount:
    """One class in an evaluation."""

    labelled: int
    """Rows with this label."""
    predicted: int
    """Rows with this prediction."""
    name: str | None = None
    """Class name, if known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Result of an evaluation."""

    rows: int
    """Rows evaluated."""
    cut: int
    """Rows truncated to `data.max_length`."""
    metrics: Mapping[str, float]
    """By name, in the order of `config.METRICS`."""
    classes: Sequence[ClassCount]
    """One entry per class; empty if the task has no single class per row."""

    @property
    def collapsed(self) -> int | None:
        """Class predicted for every row although labels differ; None if there is no such class."""
        given = [place for place, count in enumerate(self.classes) if count.predicted]
        true = sum(count.labelled > 0 for count in self.classes)
        return given[0] if len(given) == 1 and true > 1 else None


def evaluate_run(run: FinishedRun, split: RawSplit, batch_size: int | None = None) -> Evaluation:
    """Evaluate a finished run's model.

    Args:
        run: The loaded run.
        split: Rows with labels.
        batch_size: Rows per forward pass; None uses the run's own and reproduces its metrics.

    Raises:
        DataError: If a column is missing or a row is invalid for the task.
        NonFiniteError: If the loss is not finite.
    """
    rows = run.task.read_split(split, run.config.data, run.processor, run.num_labels)
    trainer = _make_trainer(run, rows, batch_size)
    seen = _count_classes(trainer) if run.config.task in ONE_CLASS_A_ROW else {}
    logged = trainer.evaluate()
    return Evaluation(
        rows=len(rows.inputs),
        cut=rows.cut,
        metrics={name: logged[f"eval_{name}"] for name in METRICS[run.config.task]},
        classes=[
            ClassCount(
                labelled=seen["labelled"][place], predicted=seen["predicted"][place], name=name
            )
            for place, name in enumerate(_names(run))
        ]
        if seen
        else (),
    )


def _names(run: FinishedRun) -> Sequence[str | None]:
    """Return one name per class; None for unnamed classes."""
    count = run.num_labels or 0
    return [*(run.class_names or ()), *[None] * count][:count]


def _make_trainer(run: FinishedRun, rows: Split, batch_size: int | None) -> Trainer:
    training = run.config.training
    if batch_size is not None:
        training = replace(training, eval_batch_size=batch_size)
    # The Trainer creates its folder, but writes nothing there.
    with TemporaryDirectory() as nowhere:
        trainer = run.task.make_trainer(
            TrainerParts(
                model=run.model,
                training=training,
                best_metric=training.best_metric or METRICS[run.config.task][0],
                checkpoints=Path(nowhere),
                data=TaskData(
                    train=rows.inputs,
                    validation=rows.inputs,
                    num_labels=run.num_labels,
                    cut={},
                ),
                processor=run.processor,
                penalty=None,
                callbacks=(),
                optimizer=None,
            )
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _count_classes(trainer: Trainer) -> dict[str, Counter[int]]:
    """Make `compute_metrics` count classes too, and return the counters it fills."""
    measure, seen = trainer.compute_metrics, {"labelled": Counter[int](), "predicted": Counter()}
    assert measure is not None

    def counted(prediction: EvalPrediction) -> dict[str, Any]:
        guesses = np.asarray(prediction.predictions).argmax(axis=-1)
        seen["predicted"].update(guesses.tolist())
        seen["labelled"].update(np.asarray(prediction.label_ids).tolist())
        metrics: dict[str, Any] = measure(prediction)
        return metrics

    trainer.compute_metrics = counted
    return seen
