"""Step 1. Check a run's record."""

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
    """Model, task and budget, which comparable runs share."""

    model: str
    task: str
    budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Results of a completed run; NaN for a non-finite number."""

    main_metric: str
    loss: float
    """Validation loss."""
    metric: float
    """Main metric on validation data."""
    test: float | None
    """Main metric on test data; None without test data."""
    test_loss: float | None
    """None without test data."""
    collapsed: bool | None
    """Whether all predictions were the same class; None if not checked."""
    live: int
    """Adapter parameters at the end."""
    peak: int
    final_ranks: Mapping[str, int]

    @property
    def is_finite(self) -> bool:
        """Whether all losses and metrics are finite."""
        return all(
            map(math.isfinite, (self.loss, self.metric, self.test or 0.0, self.test_loss or 0.0))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """Settings that tuning chose for a method."""

    learning_rate: float
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of a study."""

    path: Path
    """Study's table with the run's kind and key appended, for messages."""
    study: str
    description: str
    """Question of the study, in Markdown; may be empty."""
    kind: str
    """`final`, or `trial` for tuning."""
    cell: Cell
    method: str
    seed: int
    status: str
    error: str
    diverged: bool
    """Whether it failed because of a non-finite loss or gradient."""
    tuned: Tuned | None
    outcome: Outcome | None
    """None unless the run is final and completed."""


def as_record(path: Path, values: Mapping[str, Any]) -> Record:
    """Check the values of a record.

    Args:
        path: Place of the record, for messages.
        values: Its values; only a completed final run needs results.

    Raises:
        RunFileError: If a key is missing or has an invalid value.
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
