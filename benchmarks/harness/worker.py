"""Worker processes, each of which executes runs one after another.

A worker is `python -m benchmarks.harness.worker PIPE WORKSPACE THREADS PARENT`, which receives runs
from a pipe until it closes.

One process executes many runs, because importing the libraries takes seconds. If the system kills
it for lack of memory, the study continues with a new process.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.harness.assignment import RUNS_PER_PROCESS, Assignment, Outcome

PATIENCE_SECONDS = 10.0
"""Time for an idle process to exit before it is killed."""
LOG = "log"
"""File in the workspace with the output of libraries."""
WATCH_SECONDS = 1.0
"""Interval between checks for the parent process."""
REMOVALS = 100
"""Maximum attempts to remove a folder."""


@dataclass(frozen=True, slots=True)
class Served:
    """A process, its pipe and its folder."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    workspace: Path


class Worker:
    """One process, started when needed."""

    def __init__(self, *, threads: int, runs: int = RUNS_PER_PROCESS) -> None:
        """Store torch's threads, 0 for its default, and the runs before a process is replaced."""
        self.threads = threads
        self.runs = runs
        self.stopped = False
        self._served: Served | None = None
        self._done = 0

    def execute(self, assignment: Assignment) -> Outcome:
        """Execute a run in the process and return its outcome, even if the process dies."""
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
        """Kill the process."""
        self.stopped = True
        if self._served is not None:
            self._served.process.kill()

    def close(self) -> None:
        """Wait for the process to exit, and remove its workspace."""
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
        """Return the outcome of a run whose process died."""
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
    with theirs, (workspace / LOG).open("wb") as log:
        words = [str(theirs.fileno()), str(workspace), str(threads), str(os.getpid())]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.worker", *words],
            # The working folder may be outside the repository.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    return Served(process, ours, workspace)


class LocalExecutor:
    """A worker per calling thread."""

    def __init__(self, count: int, *, runs: int = RUNS_PER_PROCESS) -> None:
        """Share the machine's cores among `count` calling threads, with a process each."""
        told = count == 1 or "OMP_NUM_THREADS" in os.environ
        self._threads = 0 if told else max(1, (os.cpu_count() or 1) // count)
        self._runs = runs
        self._workers: dict[int, Worker] = {}
        self._stopped = False
        self._lock = threading.Lock()

    def execute(self, assignment: Assignment) -> Outcome:
        """Execute a run in the worker of the calling thread."""
        with self._lock:
            if self._stopped:
                return Outcome(status="interrupted")
            fresh = Worker(threads=self._threads, runs=self._runs)
            worker = self._workers.setdefault(threading.get_ident(), fresh)
        return worker.execute(assignment)

    def stop(self) -> None:
        """Kill all workers."""
        with self._lock:
            self._stopped = True
            for worker in self._workers.values():
                worker.stop()

    def close(self) -> None:
        """Close all workers; `execute` must not be called afterwards."""
        for worker in self._workers.values():
            worker.close()


def serve(pipe: Connection, threads: int) -> None:
    """Execute the pipe's assignments with torch's threads, 0 for its default, until it closes."""
    # Only now: these load torch.
    import torch

    from benchmarks.harness.execute import execute

    if threads:
        torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(execute(pipe.recv()))


def watch(parent: int, workspace: Path) -> None:
    """Exit this process when its parent dies."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    remove(workspace)
    os._exit(1)


def remove(workspace: Path) -> None:
    """Remove the workspace, even while a run writes into it."""
    for _ in range(REMOVALS):
        shutil.rmtree(workspace, ignore_errors=True)
        if not workspace.exists():
            return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    PLACE = Path(sys.argv[2])
    threading.Thread(target=watch, args=(int(sys.argv[4]), PLACE), daemon=True).start()
    serve(Connection(int(sys.argv[1])), int(sys.argv[3]))
    remove(PLACE)  # in case the parent was killed
