"""A process that does runs one after another, and the end of the pipe from which they are given.

Python and its libraries take seconds to start, a small run not many more: so one process does many.
When the system ends it, for it took too much memory, the study goes on with another.
"""

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dynlora.bench.assignment import Assignment, Outcome

RUNS_PER_PROCESS = 20
"""After so many a new process is started: libraries keep what they made for shapes long gone."""
PATIENCE_SECONDS = 10.0
"""Time that a process without work is given to end by itself."""
WATCH_SECONDS = 1.0
"""Time between two looks at whether the parent is still there."""


class Worker:
    """One process, started when it is first needed."""

    def __init__(self, *, threads: int | None, runs: int = RUNS_PER_PROCESS) -> None:
        """Prepare.

        Args:
            threads: Threads of torch in the process; None leaves that to torch.
            runs: After how many runs a new process is started.
        """
        self.threads = threads
        self.runs = runs
        self.stopped = False
        self._process: Any = None
        self._pipe: Connection | None = None
        self._workspace: Path | None = None
        self._done = 0

    def execute(self, assignment: Assignment) -> Outcome:
        """Do a run in the process and return its outcome, also if the process is ended."""
        if self.stopped:
            return Outcome(status="interrupted")
        if self._process is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(replace(assignment, workspace=self._workspace))
            outcome: Outcome = self._pipe.recv()
        except (EOFError, OSError):
            return self._ended()
        self._done += 1
        broken = outcome.status == "out_of_memory" or self._done >= self.runs
        if broken and not self.stopped:
            self.close()
        return outcome

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.stopped = True
        self._kill()

    def close(self) -> None:
        """Let the process end, which it does when it has nothing to do, and remove what it left."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join(PATIENCE_SECONDS)
            self._kill()
            self._process.join()
        if self._workspace is not None:
            shutil.rmtree(self._workspace, ignore_errors=True)
        self._process = self._pipe = self._workspace = None

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.is_alive():
            process.kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._workspace = Path(tempfile.mkdtemp(prefix="dynlora-bench-"))
        self._process = context.Process(
            target=_serve, args=(theirs, self._workspace, self.threads, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()
        self._done = 0

    def _ended(self) -> Outcome:
        """Return the outcome of a run whose process is no more."""
        self._process.join()
        code, said = self._process.exitcode, _last_line(self._workspace)
        self.close()
        if self.stopped:
            return Outcome(status="interrupted")
        if code == -signal.SIGKILL:
            why = "the process was killed by signal 9: most likely the system ran out of memory"
            return Outcome(status="out_of_memory", error=why)
        ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return Outcome(status="failed", error=f"the process was ended {ended}{said}")


def _last_line(workspace: Path | None) -> str:
    assert workspace is not None
    lines = (workspace / "log").read_text(errors="replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def _serve(pipe: Connection, workspace: Path, threads: int | None, parent: int) -> None:
    """Do runs until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    threading.Thread(target=_watch, args=(parent, workspace), daemon=True).start()
    with (workspace / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # Only now: these load torch, and what they say belongs into the log.
    import torch

    from dynlora.bench.execute import execute

    if threads is not None:
        torch.set_num_threads(threads)
    while True:
        try:
            assignment = pipe.recv()
        except EOFError:
            return
        pipe.send(execute(assignment))


def _watch(parent: int, workspace: Path) -> None:
    """End the process when its parent was killed: nobody would take what it finds."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    shutil.rmtree(workspace, ignore_errors=True)
    os._exit(1)


class LocalExecutor:
    """A worker for each thread that asks."""

    def __init__(self, count: int, *, runs: int = RUNS_PER_PROCESS) -> None:
        """Prepare for `count` threads, which share the machine's cores."""
        own = "OMP_NUM_THREADS" in os.environ or count == 1
        self._threads = None if own else max(1, (os.cpu_count() or 1) // count)
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
