"""Step 1. One record: the JSON of a run in, checked values out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.report.fields import Fields

STATUSES = ("completed", "failed", "out_of_memory", "interrupted", "running")
KINDS = ("final", "trial")


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """What runs must share to be compared."""

    model: str
    task: str
    budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a completed run measured; NaN stands for a number that was not finite."""

    main_metric: str
    loss: float
    """On validation data."""
    metric: float
    """The main metric on validation data."""
    test: float | None
    """The main metric on test data; None where there is none."""
    test_loss: float | None
    """None where there is no test data."""
    collapsed: bool | None
    """Whether every guess was the same class; None where nobody looked."""
    live: int
    """Adapter parameters at the end."""
    peak: int
    final_ranks: Mapping[str, int]

    @property
    def is_finite(self) -> bool:
        """Whether the run ended with a model that has a loss and a metric."""
        return all(
            map(math.isfinite, (self.loss, self.metric, self.test or 0.0, self.test_loss or 0.0))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What tuning chose for a method."""

    learning_rate: float
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of a study."""

    path: Path
    """The study's table, and below it the run's kind and key: for messages."""
    study: str
    description: str
    """What the study asks, in Markdown; empty where nobody wrote it."""
    kind: str
    """`final`, or `trial` for a run that only served to tune."""
    cell: Cell
    method: str
    seed: int
    status: str
    error: str
    diverged: bool
    """Whether it failed because a loss or gradient was not finite."""
    tuned: Tuned | None
    outcome: Outcome | None
    """None unless a final run completed."""


def as_record(path: Path, values: Mapping[str, Any]) -> Record:
    """Return the record that a file holds.

    Args:
        path: The place of the record, for messages.
        values: What it holds. Only a completed final run needs results.

    Raises:
        RunFileError: If a key is missing or holds something else.
    """
    fields = Fields(path, values)
    kind, status = fields.one_of("kind", KINDS), fields.one_of("status", STATUSES)
    is_measured = kind == "final" and status == "completed"
    return Record(
        path=path,
        study=fields.name("study"),
        description=fields.text("description").strip(),
        kind=kind,
        cell=Cell(fields.name("model"), fields.name("task"), fields.whole("budget")),
        method=fields.name("method"),
        seed=fields.whole("seed"),
        status=status,
        error=fields.text("error"),
        diverged=bool(fields.flag("diverged")),
        tuned=_tuned(fields.inside("tuned")) if values.get("tuned") is not None else None,
        outcome=_outcome(fields) if is_measured else None,
    )


def _tuned(fields: Fields) -> Tuned:
    return Tuned(learning_rate=fields.number("learning_rate"), scale=fields.number("scale"))


def _outcome(fields: Fields) -> Outcome:
    metric, validation = fields.name("main_metric"), fields.inside("validation")
    parameters = fields.inside("parameters")
    has_test = fields.values.get("test") is not None
    return Outcome(
        main_metric=metric,
        loss=validation.number("loss"),
        metric=validation.number(metric),
        test=fields.inside("test").number(metric) if has_test else None,
        test_loss=fields.inside("test").number("loss") if has_test else None,
        collapsed=fields.flag("collapsed"),
        live=parameters.whole("end"),
        peak=parameters.whole("peak"),
        final_ranks=fields.ranks("final_ranks"),
    )
