"""Evaluation of a finished run on any labelled rows, with the Trainer used in training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import EvalPrediction

from dynlora.train.config import METRICS
from dynlora.train.data.splits import RawSplit
from dynlora.train.finished_run import FinishedRun
from dynlora.train.task import make_trainer
from dynlora.train.trainer import TrainerParts

ONE_CLASS_A_ROW = ("sequence_classification", "image_classification")
"""Tasks with a single class per row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCount:
    """One class in an evaluation."""

    labelled: int
    predicted: int
    name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Result of an evaluation."""

    rows: int
    cut: int
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
    """Evaluate a finished run's model on labelled rows.

    Without `batch_size`, the run's own counts, which reproduces its metrics.

    Raises:
        DataError: If a column is missing or a row is invalid for the task.
        NonFiniteError: If the loss is not finite.
    """
    task, training = run.config.task, run.config.training
    if batch_size is not None:
        training = replace(training, eval_batch_size=batch_size)
    rows = run.task.read_split(split, run.config.data, run.processor, run.num_labels)
    parts = TrainerParts(
        model=run.model,
        training=training,
        best_metric=METRICS[task][0],
        train=rows.inputs,
        validation=rows.inputs,
        processor=run.processor,
    )
    trainer = make_trainer(run.task, parts)
    seen = _count_classes(trainer) if task in ONE_CLASS_A_ROW else None
    logged = trainer.evaluate()
    return Evaluation(
        rows=len(rows.inputs),
        cut=rows.cut,
        metrics={name: logged[f"eval_{name}"] for name in METRICS[task]},
        classes=() if seen is None else _classes(run, *seen),
    )


def _classes(run: FinishedRun, labelled: Counter[int], predicted: Counter[int]) -> list[ClassCount]:
    names = [*(run.class_names or ()), *[None] * (run.num_labels or 0)][: run.num_labels]
    return [
        ClassCount(labelled=labelled[place], predicted=predicted[place], name=name)
        for place, name in enumerate(names)
    ]


def _count_classes(trainer: Any) -> tuple[Counter[int], Counter[int]]:
    """Make `compute_metrics` also count labelled and predicted classes; return the counters."""
    measure, labelled, predicted = trainer.compute_metrics, Counter[int](), Counter[int]()

    def counted(prediction: EvalPrediction) -> dict[str, Any]:
        predicted.update(np.asarray(prediction.predictions).argmax(axis=-1).tolist())
        labelled.update(np.asarray(prediction.label_ids).tolist())
        metrics: dict[str, Any] = measure(prediction)
        return metrics

    trainer.compute_metrics = counted
    return labelled, predicted
