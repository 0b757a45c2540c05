"""Step 1. One record: the JSON of a run in, checked values out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora.errors import RunFileError

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
    collapsed: bool | None
    """Whether every guess was the same class; None where nobody looked."""
    live: int
    """Adapter parameters at the end."""
    peak: int
    training: float
    """Seconds in training steps; NaN where unknown."""
    dynamic: float
    """Seconds of those in moving ranks; NaN where unknown."""
    final_ranks: Mapping[str, int]

    @property
    def is_finite(self) -> bool:
        """Whether the run ended with a model that has a loss and a metric."""
        return all(map(math.isfinite, (self.loss, self.metric, self.test or 0.0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What tuning chose for a method."""

    learning_rate: float
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of a study."""

    path: Path
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
        path: Where it was read, for messages.
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


def _tuned(fields: "Fields") -> Tuned:
    return Tuned(learning_rate=fields.number("learning_rate"), scale=fields.number("scale"))


def _outcome(fields: "Fields") -> Outcome:
    metric, validation = fields.name("main_metric"), fields.inside("validation")
    parameters, seconds = fields.inside("parameters"), fields.inside("seconds")
    has_test = fields.values.get("test") is not None
    return Outcome(
        main_metric=metric,
        loss=validation.number("loss"),
        metric=validation.number(metric),
        test=fields.inside("test").number(metric) if has_test else None,
        collapsed=fields.flag("collapsed"),
        live=parameters.whole("end"),
        peak=parameters.whole("peak"),
        training=seconds.number("training_steps"),
        dynamic=seconds.number("dynamic_part"),
        final_ranks=fields.ranks("final_ranks"),
    )


@dataclass(frozen=True, slots=True)
class Fields:
    """The values of an object in a record, each checked as it is read."""

    path: Path
    values: Mapping[str, Any]
    place: str = ""
    """The keys that lead to the object."""

    def inside(self, key: str) -> "Fields":
        """Return the object under a key."""
        found = self._needed(key)
        if isinstance(found, dict):
            return Fields(self.path, found, f"{self.place}{key}.")
        raise self._wrong(key, "an object", found)

    def name(self, key: str) -> str:
        """Return a text that can stand in a table: not empty, on one line."""
        found = self._needed(key)
        if isinstance(found, str) and found.strip() and found.isprintable():
            return found
        raise self._wrong(key, "a name of printable characters", found)

    def text(self, key: str) -> str:
        """Return a text that may be missing, without what cannot be printed."""
        found = self.values.get(key)
        if found is None:
            return ""
        if isinstance(found, str):
            return "".join(c if c.isprintable() or c == "\n" else " " for c in found)
        raise self._wrong(key, "a text or null", found)

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        """Return one of the words that are known."""
        found = self._needed(key)
        if found in known:
            return str(found)
        raise self._wrong(key, f"one of {', '.join(known)}", found)

    def whole(self, key: str) -> int:
        """Return a whole number of at least 0."""
        found = self._needed(key)
        if type(found) is int and found >= 0:
            return found
        raise self._wrong(key, "a whole number of at least 0", found)

    def number(self, key: str) -> float:
        """Return a number; NaN for null, which is how JSON holds what is not finite."""
        found = self._needed(key)
        if found is None:
            return math.nan
        if type(found) is int or type(found) is float:
            return float(found) if abs(found) < math.inf else math.nan
        raise self._wrong(key, "a number or null", found)

    def flag(self, key: str) -> bool | None:
        """Return yes or no, or None where it is null or missing."""
        found = self.values.get(key)
        if found is None or isinstance(found, bool):
            return found
        raise self._wrong(key, "true, false or null", found)

    def ranks(self, key: str) -> Mapping[str, int]:
        """Return ranks by module name; empty for a method without ranks."""
        inside = self.inside(key)
        return {name: inside.whole(name) for name in inside.values}

    def _needed(self, key: str) -> Any:
        if key not in self.values:
            raise RunFileError(
                f"{self.path} must hold `{self.place}{key}`, got an object without it: run the "
                "study again, or move the file out of the results."
            )
        return self.values[key]

    def _wrong(self, key: str, required: str, given: object) -> RunFileError:
        return RunFileError(
            f"`{self.place}{key}` of {self.path} must be {required}, got {str(given)[:60]!r}: run "
            "the study again, or move the file out of the results."
        )
