"""Main loop of a worker process: receive runs from a pipe and execute them until the pipe closes.

`benchmarks.harness.worker` starts it as `python -m benchmarks.harness.serve PIPE WORKSPACE THREADS
PARENT`.
"""

import os
import shutil
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

WATCH_SECONDS = 1.0
"""Interval between checks for the parent process."""
REMOVALS = 100
"""Maximum attempts to remove a folder."""


def serve(pipe: Connection, threads: int) -> None:
    """Execute runs until the other end of the pipe closes.

    Args:
        pipe: Receives assignments and sends outcomes.
        threads: Threads of torch; 0 uses torch's default.
    """
    # Only now: these load torch.
    import torch

    from benchmarks.harness.execute import execute

    if threads:
        torch.set_num_threads(threads)
    while True:
        try:
            pipe.send(execute(pipe.recv()))
        except (EOFError, BrokenPipeError):
            return


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


def main(pipe: int, workspace: Path, threads: int, parent: int) -> None:
    """Start the parent watch and serve runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=watch, args=(parent, workspace), daemon=True).start()
    serve(Connection(pipe), threads)
    remove(workspace)  # in case the parent was killed


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
