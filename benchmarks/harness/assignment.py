"""What a worker is given, and what it gives back. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from benchmarks.harness.runs import ExamRows
from dynlora.train.config import JobConfig

RUNS_PER_PROCESS = 20
"""After so many a new process is started: libraries keep what they made for shapes long gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a worker is given."""

    config: JobConfig
    """With the folders of this machine."""
    exam: ExamRows | None
    keep: Path | None
    """Where the run's folder stays; None lets it go when all is known."""
    workspace: Path | None
    """Where the folder of the run is made meanwhile; None takes the system's place for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a run."""

    status: str
    """`completed`, `failed`, `out_of_memory` or `interrupted`."""
    error: str | None = None
    diverged: bool = False
    """Whether it failed because of its settings: the loss was no longer finite."""
    values: dict[str, Any] | None = None
    """What a completed run found, by the names of the record."""
    notes: tuple[str, ...] = ()
    """What dynlora warned of."""


@runtime_checkable
class Executor(Protocol):
    """What does runs, one at a time for each thread that asks."""

    def execute(self, assignment: Assignment) -> Outcome:
        """Do a run and return its outcome, whatever comes of it."""
        ...

    def stop(self) -> None:
        """End all that is under way; those who wait for an outcome get `interrupted`."""
        ...

    def close(self) -> None:
        """Give back what was taken; no thread may ask any more."""
        ...
