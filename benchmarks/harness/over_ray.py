"""Execute runs in the processes of a Ray cluster, on one or several machines.

Each machine needs dynlora, this repository, the models and the data under the same paths. This
machine writes the records.
"""

import logging
import threading
from typing import Any

from benchmarks.harness.assignment import RUNS_PER_PROCESS, Assignment, Outcome
from dynlora.errors import ConfigError

HERE = "local"
"""Address that starts a Ray cluster for the study."""


class RayExecutor:
    """Submits each run to Ray, which assigns it a core, or a GPU if the cluster has GPUs."""

    def __init__(self, address: str, *, runs: int = RUNS_PER_PROCESS) -> None:
        """Join the cluster at `auto`, a host and port, or `HERE`.

        Raises:
            ConfigError: If Ray is not installed, or there is no cluster at the address.
        """
        try:
            import ray
            import ray.exceptions
        except ModuleNotFoundError as error:
            raise ConfigError(
                "`--ray` needs Ray, which is not installed. Run `pip install ray`, or omit `--ray`."
            ) from error
        self._ray: Any = ray
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"`--ray` must be {HERE} or the address of a running Ray cluster, such as auto "
                f"or HOST:6379, but got {address}: {' '.join(str(error).split())}"
            ) from error
        found = self._ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        self.places = max(1, gpus or int(found.get("CPU", 1)))
        """Runs that the cluster has room for at once."""
        # Only now: this loads torch.
        from benchmarks.harness.execute import execute

        self._task = self._ray.remote(
            max_retries=0, max_calls=runs, num_cpus=1, num_gpus=1 if gpus else 0
        )(execute)
        self._stopped = False
        self._under_way: set[Any] = set()
        self._lock = threading.Lock()

    def execute(self, assignment: Assignment) -> Outcome:
        """Execute a run in the cluster and return its outcome."""
        with self._lock:
            if self._stopped:
                return Outcome(status="interrupted")
            reference = self._task.remote(assignment)
            self._under_way.add(reference)
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if self._stopped:
                return Outcome(status="interrupted")
            full = isinstance(error, self._ray.exceptions.OutOfMemoryError)
            said = " ".join(str(error).split())
            status = "out_of_memory" if full else "failed"
            return Outcome(status=status, error=f"{type(error).__name__}: {said}")
        finally:
            with self._lock:
                self._under_way.discard(reference)
        return outcome

    def stop(self) -> None:
        """Cancel all current runs."""
        with self._lock:
            self._stopped = True
            for reference in self._under_way:
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here."""
        self._ray.shutdown()
