"""Execute one run, with the same two calls for every method.

The first trains the job as `dynlora train` does. The second, skipped for trials, evaluates the
saved model on the exam's rows as `dynlora eval` does.
"""

import ctypes
import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness.assignment import Assignment, Outcome
from benchmarks.harness.runs import ExamRows
from dynlora.errors import NonFiniteError, is_out_of_memory
from dynlora.runs.folder import RunFolder
from dynlora.runs.reader import RunFiles, read_run
from dynlora.train.config import METRICS, JobConfig
from dynlora.train.data.splits import find_split, sample
from dynlora.train.finished_run import evaluate_run, load_run
from dynlora.train.job import run_job

PEAK_RESET = Path("/proc/self/clear_refs")
"""File that resets the peak memory count on Linux."""


def execute(given: Assignment) -> Outcome:
    """Execute a run and return its outcome, even after an error."""
    with _notes() as notes:
        try:
            values = _run_within(given)
        except Exception as error:  # noqa: BLE001  the record contains the error
            status = "out_of_memory" if is_out_of_memory(error) else "failed"
            said = f"{type(error).__name__}: {error}"
            diverged = isinstance(error, NonFiniteError)
            return Outcome(status=status, error=said, diverged=diverged, notes=tuple(notes))
        finally:
            gc.collect()
    return Outcome(status="completed", values=values, notes=tuple(notes))


def _run_within(given: Assignment) -> dict[str, Any]:
    if given.keep is not None:
        return _run(given, given.keep)
    with TemporaryDirectory(dir=given.workspace) as folder:
        return _run(given, Path(folder) / "run")


def _run(given: Assignment, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    config = replace(given.config, output=str(folder), overwrite=True)
    _count_peak_anew()
    run_job(config, Console(quiet=True))
    values = _values(read_run(folder), config)
    if given.exam is not None:
        started = time.perf_counter()
        values |= _examine(folder, config, given.exam)
        values["seconds"]["test"] = round(time.perf_counter() - started, 3)
    values["seconds"]["whole"] = round(time.perf_counter() - began, 3)
    return values


def _examine(folder: Path, config: JobConfig, exam: ExamRows) -> dict[str, Any]:
    """Evaluate a finished run's model on the exam's rows."""
    run = load_run(RunFolder(folder), config)
    found = evaluate_run(run, sample(find_split(config.data, exam.split), exam.max_rows))
    values = {"test": dict(found.metrics), "test_rows": found.rows}
    if found.classes:
        commonest = max(count["labelled"] for count in found.classes)
        values["collapsed"] = found.collapsed is not None
        values["majority"] = commonest / found.rows
    return values


def _values(run: RunFiles, config: JobConfig) -> dict[str, Any]:
    facts = run.facts
    return {
        "main_metric": METRICS[config.task][0],
        "validation": dict(run.after),
        "test": None,
        "collapsed": None,
        "majority": None,
        "parameters": dict(run.parameters),
        "seconds": dict(run.seconds),
        "peak_memory_bytes": run.memory["peak_memory_bytes"],
        "peak_gpu_memory_bytes": run.memory["peak_gpu_memory_bytes"],
        "initial_ranks": dict(run.initial_ranks),
        "final_ranks": dict(run.final_ranks),
        "rank_changes": [
            [event.step, name, layer.rank_after]
            for event in run.events
            for name, layer in event.layers.items()
            if layer.rank_after != layer.rank_before
        ],
        "steps": run.steps,
        "events": len(run.events),
        "budget_parameters": run.budget,
        "rows": dict(run.rows),
        "bf16": facts.get("bf16"),
        "versions": facts.get("versions"),
        "machine": facts.get("machine"),
    }


@contextmanager
def _notes() -> Iterator[list[str]]:
    """Yield a list that collects the warnings of dynlora."""
    notes: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    logger, handler = logging.getLogger("dynlora"), Keep(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)


def _count_peak_anew() -> None:
    """Reset the peak memory count, because a worker executes many runs.

    First return memory of earlier runs to the system as far as possible.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        PEAK_RESET.write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        pass  # not Linux: the peak includes earlier runs
