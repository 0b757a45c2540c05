"""Runs over Ray, with a stand-in for Ray: what it is asked, and what its errors become."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.assignment import Assignment, Outcome
from benchmarks.harness.execute import execute
from benchmarks.harness.over_ray import RayExecutor
from benchmarks.harness.runs import Cell
from dynlora.errors import ConfigError
from tests.harness.studies import make_jobs


class RayError(Exception):
    pass


class OutOfMemoryError(RayError):
    pass


class StandInRay(types.ModuleType):
    """As much of Ray as is used."""

    def __init__(self, resources: dict[str, float]) -> None:
        super().__init__("ray")
        self.exceptions = types.ModuleType("ray.exceptions")
        self.exceptions.RayError = RayError  # type: ignore[attr-defined]
        self.exceptions.OutOfMemoryError = OutOfMemoryError  # type: ignore[attr-defined]
        self.resources = resources
        self.told: dict[str, Any] = {}
        self.become: Callable[[], Outcome] = lambda: Outcome(status="completed")
        self.cancelled: list[Any] = []
        self.left = False

    def init(self, **options: Any) -> None:
        if options["address"] == "nobody:1":
            raise ConnectionError("no cluster\nthere")
        self.told |= options

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        self.told |= options

        def wrap(function: Any) -> Any:
            self.told["function"] = function
            return types.SimpleNamespace(remote=lambda *given: given)

        return wrap

    def get(self, reference: Any) -> Outcome:
        return self.become()

    def cancel(self, reference: Any, *, force: bool) -> None:
        self.cancelled.append((reference, force))

    def shutdown(self) -> None:
        self.left = True


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandInRay:
    stand_in = StandInRay({"CPU": 6.0})
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setitem(sys.modules, "ray.exceptions", stand_in.exceptions)
    return stand_in


@pytest.fixture
def assignment(tmp_path: Path) -> Assignment:
    run = make_jobs(tmp_path).final(Cell("tiny", "rows", "lora", 2), 0, None)
    return Assignment(config=run.config, exam=run.exam, keep=None, workspace=None)


def test_ray_does_what_a_worker_does(ray: StandInRay, assignment: Assignment) -> None:
    executor = RayExecutor("auto", runs=5)
    assert executor.execute(assignment) == Outcome(status="completed")
    assert ray.told["function"] is execute
    assert (ray.told["address"], ray.told["max_calls"], ray.told["max_retries"]) == ("auto", 5, 0)
    assert (ray.told["num_cpus"], ray.told["num_gpus"]) == (1, 0)
    assert executor.places == 6
    executor.close()
    assert ray.left


def test_each_run_has_a_gpu_where_there_are_some(ray: StandInRay) -> None:
    ray.resources = {"CPU": 64.0, "GPU": 4.0}
    assert RayExecutor("auto").places == 4
    assert ray.told["num_gpus"] == 1


@pytest.mark.parametrize(
    ("error", "status"), [(OutOfMemoryError, "out_of_memory"), (RayError, "failed")]
)
def test_what_ray_could_not_do_is_told_apart(
    ray: StandInRay, assignment: Assignment, error: type[Exception], status: str
) -> None:
    def fail() -> Outcome:
        raise error("on node 7\nof 8")

    ray.become = fail
    outcome = RayExecutor("auto").execute(assignment)
    assert outcome == Outcome(status=status, error=f"{error.__name__}: on node 7 of 8")


def test_a_stop_cancels_what_is_under_way(ray: StandInRay, assignment: Assignment) -> None:
    executor = RayExecutor("auto")

    def stop() -> Outcome:
        executor.stop()
        raise RayError("cancelled")

    ray.become = stop
    assert executor.execute(assignment) == Outcome(status="interrupted")
    assert [force for _, force in ray.cancelled] == [True]
    assert executor.execute(assignment) == Outcome(status="interrupted")
    assert len(ray.cancelled) == 1


def test_a_cluster_that_is_not_there_is_named(ray: StandInRay) -> None:
    with pytest.raises(
        ConfigError, match=r"`--ray` must be local, .* got nobody:1: no cluster the"
    ):
        RayExecutor("nobody:1")


def test_ray_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install ray"):
        RayExecutor("local")
