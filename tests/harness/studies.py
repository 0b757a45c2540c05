"""Tiny studies, and an executor that replaces workers, for tests of the harness."""

import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.assignment import Assignment, Outcome
from benchmarks.harness.runs import Combination, Jobs, merge, resolve_jobs
from benchmarks.harness.study import Study, read_study

SCORES = {"accuracy": 0.75, "f1": 0.7, "matthews": 0.5, "loss": 0.5}
FOUND: Mapping[str, Any] = {
    "main_metric": "accuracy", "validation": SCORES, "test": None, "collapsed": None,
    "majority": None, "parameters": {"start": 10, "peak": 12, "end": 9},
    "seconds": {"training_steps": 1.0, "dynamic_part": 0.0, "evaluation": 0.5, "whole": 2.0},
    "peak_memory_bytes": 1000, "initial_ranks": {}, "final_ranks": {"query": 2}, "steps": 10,
    "versions": {}, "machine": {},
}  # fmt: skip
"""Results of a run, by the record's keys."""
TUNE: Mapping[str, Any] = {
    "trials": 3, "seed": 1000, "learning_rate": [1.0e-3, 1.0e-1], "scale": [1, 8],
}  # fmt: skip
LORA = Combination("tiny", "rows", "lora", 2)
DYNAMIC = Combination("tiny", "rows", "dynamic", 2)


def study_values(**changes: Any) -> dict[str, Any]:
    """Return a study of two methods, one task, one model, one budget and two seeds."""
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "bf16": False}
    quiet = {"eval": "no", "save": "no", "eval_on_start": False}
    values = {
        "results": "results",
        "models": {"tiny": {"model": {"path": "{models}/model"}}},
        "tasks": {"rows": {"data": {"path": "{data}/rows", "validation_rows_from_train": 8}}},
        "methods": {"lora": {"method": "lora"}, "dynamic": {"method": "dynamic"}},
        "budgets": [2],
        "seeds": [0, 1],
        "base": {"data": {"max_length": 16}, "training": training | quiet},
        "evaluate": {"split": "validation"},
    }
    return merge(values, changes)


def write_study(folder: Path, **changes: Any) -> Path:
    """Write a study whose records are in the same folder."""
    values = study_values(**changes)
    path = folder / "small.yaml"
    values["results"] = str(folder / values["results"])
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def make_study(folder: Path, **changes: Any) -> Study:
    """Return a study as read from its file."""
    return read_study(write_study(folder, **changes))


def make_jobs(folder: Path, **changes: Any) -> Jobs:
    """Return the jobs of a study."""
    return resolve_jobs(make_study(folder, **changes))


def completed(assignment: Assignment, **values: Any) -> Outcome:
    """Return the outcome of a completed run."""
    test = None if assignment.exam is None else FOUND["validation"]
    return Outcome(status="completed", values={**FOUND, "test": test, **values})


class StandIn:
    """Executor that collects its assignments and returns invented outcomes."""

    def __init__(self, become: Callable[[Assignment], Outcome] = completed) -> None:
        self.become = become
        self.asked: list[Assignment] = []
        self.stopped = threading.Event()
        self.closed = False

    def execute(self, assignment: Assignment) -> Outcome:
        self.asked.append(assignment)
        return self.become(assignment)

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.closed = True

    def interrupt_at(self, number: int) -> None:
        """Send Ctrl-C to this process during a run, counted from 1."""
        # A shell ignores Ctrl-C for processes in its background.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def become(given: Assignment) -> Outcome:
            if len(self.asked) < number:
                return completed(given)
            os.kill(os.getpid(), signal.SIGINT)
            assert self.stopped.wait(20)
            return Outcome(status="interrupted")

        self.become = become
