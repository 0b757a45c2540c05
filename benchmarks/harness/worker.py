"""A process that does runs one after another, and the end of the pipe from which they are given.

Python and its libraries take seconds to start, a small run not many more: so one process does many.
When the system ends it, for it took too much memory, the study goes on with another.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.harness.assignment import RUNS_PER_PROCESS, Assignment, Outcome

PATIENCE_SECONDS = 10.0
"""Time that a process without work is given to end by itself."""
LOG = "log"
"""File of the workspace with what libraries say."""


@dataclass(frozen=True, slots=True)
class Served:
    """A process, the pipe to it, and the folder that it writes into."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    workspace: Path


class Worker:
    """One process, started when it is first needed."""

    def __init__(self, *, threads: int, runs: int = RUNS_PER_PROCESS) -> None:
        """Prepare.

        Args:
            threads: Of torch in the process; 0 leaves them to torch.
            runs: After how many runs a new process is started.
        """
        self.threads = threads
        self.runs = runs
        self.stopped = False
        self._served: Served | None = None
        self._done = 0

    def execute(self, assignment: Assignment) -> Outcome:
        """Do a run in the process and return its outcome, also if the process is ended."""
        served = self._served = self._served or _start(self.threads)
        if self.stopped:
            return Outcome(status="interrupted")
        try:
            served.pipe.send(replace(assignment, workspace=served.workspace))
            outcome: Outcome = served.pipe.recv()
        except (EOFError, OSError):
            return self._ended(served)
        self._done += 1
        if outcome.status == "out_of_memory" or self._done >= self.runs:
            self.close()
        return outcome

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.stopped = True
        if self._served is not None:
            self._served.process.kill()

    def close(self) -> None:
        """Let the process end, which it does when it has nothing to do, and remove what it left."""
        served, self._served, self._done = self._served, None, 0
        if served is None:
            return
        served.pipe.close()
        try:
            served.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            served.process.kill()
            served.process.wait()
        shutil.rmtree(served.workspace, ignore_errors=True)

    def _ended(self, served: Served) -> Outcome:
        """Return the outcome of a run whose process is no more."""
        code = served.process.wait()
        said = (served.workspace / LOG).read_text(errors="replace").strip().splitlines()
        self.close()
        if self.stopped:
            return Outcome(status="interrupted")
        if code == -signal.SIGKILL:
            why = "the process was killed by signal 9: most likely the system ran out of memory"
            return Outcome(status="out_of_memory", error=why)
        ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        last = f": {said[-1]}" if said else ""
        return Outcome(status="failed", error=f"the process was ended {ended}{last}")


def _start(threads: int) -> Served:
    workspace = Path(tempfile.mkdtemp(prefix="dynlora-bench-"))
    ours, theirs = Pipe()
    words = [str(theirs.fileno()), str(workspace), str(threads), str(os.getpid())]
    with (workspace / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.serve", *words],
            # The working folder need not be the repository.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    theirs.close()
    return Served(process, ours, workspace)


class LocalExecutor:
    """A worker for each thread that asks."""

    def __init__(self, count: int, *, runs: int = RUNS_PER_PROCESS) -> None:
        """Prepare for `count` threads, which share the machine's cores.

        Args:
            count: Threads that will ask.
            runs: After how many runs a process is replaced.
        """
        told = count == 1 or "OMP_NUM_THREADS" in os.environ
        self._threads = 0 if told else max(1, (os.cpu_count() or 1) // count)
        self._runs = runs
        self._workers: dict[int, Worker] = {}
        self._stopped = False
        self._lock = threading.Lock()

    def execute(self, assignment: Assignment) -> Outcome:
        """Do a run in the worker of the thread that asks."""
        with self._lock:
            if self._stopped:
                return Outcome(status="interrupted")
            fresh = Worker(threads=self._threads, runs=self._runs)
            worker = self._workers.setdefault(threading.get_ident(), fresh)
        return worker.execute(assignment)

    def stop(self) -> None:
        """End all workers, whatever they are doing."""
        with self._lock:
            self._stopped = True
            for worker in self._workers.values():
                worker.stop()

    def close(self) -> None:
        """End all workers; no thread may ask any more."""
        for worker in self._workers.values():
            worker.close()
