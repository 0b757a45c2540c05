"""Input and output of a worker, without heavy imports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from benchmarks.harness.runs import ExamRows
from dynlora.train.config import JobConfig

RUNS_PER_PROCESS = 20
"""Runs per process before it is replaced, because libraries keep caches for old shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Input of a worker."""

    config: JobConfig
    """Job with the folders of this machine."""
    exam: ExamRows | None
    keep: Path | None
    """Permanent run folder; None deletes the folder after the run."""
    workspace: Path | None
    """Parent of the temporary run folder; None uses the system's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a run."""

    status: str
    """`completed`, `failed`, `out_of_memory` or `interrupted`."""
    error: str | None = None
    diverged: bool = False
    """Whether the loss became non-finite, which is due to the run's settings."""
    values: dict[str, Any] | None = None
    """Results of a completed run, by the record's keys."""
    notes: tuple[str, ...] = ()
    """Warnings of dynlora."""


@runtime_checkable
class Executor(Protocol):
    """Executes runs, one at a time per calling thread."""

    def execute(self, assignment: Assignment) -> Outcome:
        """Execute a run and return its outcome, even after an error."""
        ...

    def stop(self) -> None:
        """Stop all current runs, whose outcomes become `interrupted`."""
        ...

    def close(self) -> None:
        """Release all resources; `execute` must not be called afterwards."""
        ...
