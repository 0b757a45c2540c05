"""The process that does runs: it outlives them, and the study outlives it."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import benchmarks.harness.worker as module
from benchmarks.harness.assignment import Assignment, Outcome
from benchmarks.harness.runs import Cell
from benchmarks.harness.worker import LocalExecutor, Served, Worker
from tests.harness.studies import make_jobs


@pytest.fixture
def assignment(tmp_path: Path) -> Assignment:
    """Return a run whose model is not there, so that it fails at once."""
    jobs = make_jobs(tmp_path, models={"tiny": {"model": {"path": str(tmp_path / "nowhere")}}})
    run = jobs.final(Cell("tiny", "rows", "lora", 2), 0, None)
    return Assignment(config=run.config, exam=None, keep=None, workspace=None)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Served]]:
    """Return a list of the processes that are started, all of which must have ended."""
    found: list[Served] = []
    start = module._start

    def noted(threads: int) -> Served:
        found.append(start(threads))
        return found[-1]

    monkeypatch.setattr(module, "_start", noted)
    yield found
    for served in found:
        assert served.process.poll() is not None
        assert not served.workspace.exists()


def execute_and_kill(
    worker: Worker, assignment: Assignment, started: list[Served], number: int
) -> Outcome:
    """Return what becomes of a run whose process gets a signal as soon as there is one."""

    def kill() -> None:
        while not started:
            time.sleep(0.01)
        started[0].process.send_signal(number)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = worker.execute(assignment)
    killer.join()
    return outcome


def test_a_killed_process_is_taken_for_out_of_memory_and_another_goes_on(
    assignment: Assignment, started: list[Served]
) -> None:
    worker = Worker(threads=1)
    outcome = execute_and_kill(worker, assignment, started, signal.SIGKILL)
    assert (outcome.status, outcome.values) == ("out_of_memory", None)
    assert "killed by signal 9: most likely the system ran out of memory" in str(outcome.error)
    for _ in range(2):
        outcome = worker.execute(assignment)
        assert outcome.status == "failed"
        assert str(outcome.error).startswith("ConfigError: `model.path` must name a folder with a")
    assert len(started) == 2, "one process for both"
    worker.close()


def test_another_end_of_the_process_is_a_failure(
    assignment: Assignment, started: list[Served]
) -> None:
    worker = Worker(threads=1)
    outcome = execute_and_kill(worker, assignment, started, signal.SIGTERM)
    assert outcome.status == "failed"
    assert str(outcome.error).startswith("the process was ended by signal 15")
    worker.close()


def test_a_stop_ends_what_is_under_way_and_lets_nothing_begin(
    assignment: Assignment, started: list[Served]
) -> None:
    executor = LocalExecutor(1)

    def stop() -> None:
        while not started:
            time.sleep(0.01)
        executor.stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert executor.execute(assignment) == Outcome(status="interrupted")
    stopper.join()
    assert executor.execute(assignment) == Outcome(status="interrupted")
    executor.close()
    assert len(started) == 1


class Answering:
    """A pipe to nobody, which answers at once."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def send(self, assignment: Assignment) -> None:
        self.given = assignment

    def recv(self) -> Outcome:
        return self.outcome

    def close(self) -> None:
        pass


@pytest.fixture
def answering(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Outcome], list[tuple[int, Any]]]:
    """Return what lets processes answer; it returns the threads and the pipe of each."""

    def begin(outcome: Outcome) -> list[tuple[int, Any]]:
        found: list[tuple[int, Any]] = []

        def start(threads: int) -> Any:
            pipe = Answering(outcome)
            found.append((threads, pipe))
            process = subprocess.Popen(["true"])
            # Not `Served`: shapes of values are checked in tests, and this pipe is none.
            return type("Stub", (), {"process": process, "pipe": pipe, "workspace": tmp_path / "w"})

        monkeypatch.setattr(module, "_start", start)
        return found

    return begin


def test_a_process_is_replaced_after_some_runs(
    assignment: Assignment, answering: Callable[[Outcome], list[tuple[int, Any]]]
) -> None:
    started = answering(Outcome(status="completed"))
    worker = Worker(threads=0, runs=2)
    for _ in range(5):
        worker.execute(assignment)
    assert len(started) == 3
    worker.close()


def test_a_process_that_ran_out_of_memory_is_replaced(
    assignment: Assignment, answering: Callable[[Outcome], list[tuple[int, Any]]]
) -> None:
    started = answering(Outcome(status="out_of_memory"))
    worker = Worker(threads=0)
    worker.execute(assignment)
    worker.execute(assignment)
    assert len(started) == 2
    worker.close()


def test_each_thread_has_a_process_and_its_share_of_the_cores(
    assignment: Assignment,
    answering: Callable[[Outcome], list[tuple[int, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    started = answering(Outcome(status="completed"))
    executor = LocalExecutor(3)
    both = threading.Barrier(2, timeout=20)

    def ask() -> None:
        both.wait()
        executor.execute(assignment)
        executor.execute(assignment)
        both.wait()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    executor.close()
    assert [count for count, _ in started] == [2, 2]
