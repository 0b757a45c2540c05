"""Worker processes and Ray: lost processes become outcomes, and the study continues."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

import benchmarks.harness.worker as module
from benchmarks.harness.assignment import Assignment, Outcome
from benchmarks.harness.execute import execute
from benchmarks.harness.over_ray import RayExecutor
from benchmarks.harness.worker import LocalExecutor, Served, Worker
from dynlora.errors import ConfigError
from tests.harness.studies import LORA, make_jobs


@pytest.fixture
def assignment(tmp_path: Path) -> Assignment:
    """Return a run that fails at once, because its model does not exist."""
    jobs = make_jobs(tmp_path, models={"tiny": {"model": {"path": str(tmp_path / "nowhere")}}})
    run = jobs.final(LORA, 0, None)
    return Assignment(config=run.config, exam=None, keep=None, workspace=None)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Served]]:
    """Return the list of started processes, all of which must have ended after the test."""
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


def after_start(started: list[Served], count: int, act: Callable[[], None]) -> threading.Thread:
    """Act in another thread as soon as there are more than `count` processes."""

    def wait() -> None:
        while len(started) <= count:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_killed_process_has_an_outcome_and_another_continues(assignment, started):
    worker = Worker(threads=1)
    for number, status, error in (
        (signal.SIGKILL, "out_of_memory", "the process was killed by signal 9: most likely the s"),
        (signal.SIGTERM, "failed", "the process was ended by signal 15"),
    ):
        count = len(started)
        killer = after_start(
            started, count, lambda number=number: started[-1].process.send_signal(number)
        )
        outcome = worker.execute(assignment)
        killer.join()
        assert (outcome.status, outcome.values) == (status, None)
        assert str(outcome.error).startswith(error)
        assert len(started) == count + 1
    for _ in range(2):
        assert worker.execute(assignment).status == "failed"
    assert len(started) == 3
    worker.close()


def test_a_stop_ends_the_current_run_and_starts_no_other(assignment, started):
    executor = LocalExecutor(1)
    stopper = after_start(started, 0, executor.stop)
    assert executor.execute(assignment) == Outcome(status="interrupted")
    stopper.join()
    assert executor.execute(assignment) == Outcome(status="interrupted")
    executor.close()
    assert len(started) == 1


@pytest.mark.parametrize(
    ("status", "runs", "processes"), [("completed", 2, 3), ("out_of_memory", 9, 5)]
)
def test_a_process_is_replaced_after_some_runs_or_without_memory(
    assignment, monkeypatch, tmp_path, status, runs, processes
):
    pipe = MagicMock()
    pipe.recv.return_value = Outcome(status=status)
    served = SimpleNamespace(process=MagicMock(), pipe=pipe, workspace=tmp_path / "w")
    start = MagicMock(return_value=served)
    monkeypatch.setattr(module, "_start", start)
    worker = Worker(threads=0, runs=runs)
    for _ in range(5):
        worker.execute(assignment)
    worker.close()
    assert start.call_count == pipe.close.call_count == processes


class RayError(Exception):
    pass


class OutOfMemoryError(RayError):
    pass


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    errors = SimpleNamespace(RayError=RayError, OutOfMemoryError=OutOfMemoryError)
    stand_in = MagicMock(exceptions=errors)
    stand_in.cluster_resources.return_value = {"CPU": 6.0}
    stand_in.get.return_value = Outcome(status="completed")
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
    return stand_in


def test_ray_executes_runs_and_uses_gpus_if_there_are_some(ray, assignment):
    executor = RayExecutor("auto", runs=5)
    assert executor.execute(assignment) == Outcome(status="completed")
    assert executor.places == 6
    assert ray.init.call_args.kwargs["address"] == "auto"
    options = {"max_calls": 5, "max_retries": 0, "num_cpus": 1, "num_gpus": 0}
    assert ray.remote.call_args.kwargs == options
    ray.remote.return_value.assert_called_once_with(execute)
    executor.close()
    ray.shutdown.assert_called_once()
    ray.cluster_resources.return_value = {"CPU": 64.0, "GPU": 4.0}
    assert RayExecutor("auto").places == 4
    assert ray.remote.call_args.kwargs["num_gpus"] == 1


def test_an_error_or_a_stop_of_ray_becomes_an_outcome(ray, assignment):
    executor = RayExecutor("auto")
    for error, status in ((OutOfMemoryError, "out_of_memory"), (RayError, "failed")):
        ray.get.side_effect = error("on node 7\nof 8")
        expected = Outcome(status=status, error=f"{error.__name__}: on node 7 of 8")
        assert executor.execute(assignment) == expected

    def stop(_: object) -> Outcome:
        executor.stop()
        raise RayError("cancelled")

    ray.get.side_effect = stop
    for _ in range(2):
        assert executor.execute(assignment) == Outcome(status="interrupted")
    assert [call.kwargs for call in ray.cancel.call_args_list] == [{"force": True}]


def test_a_missing_cluster_is_named(ray):
    ray.init.side_effect = ConnectionError("no cluster\nthere")
    with pytest.raises(ConfigError, match=r"`--ray` must be local .* got nobody:1: no cluster the"):
        RayExecutor("nobody:1")
