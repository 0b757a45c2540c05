"""The inside of a worker: runs are taken from a pipe and done, until its other end is closed.

`benchmarks.harness.worker` starts it: `python -m benchmarks.harness.serve PIPE WORKSPACE THREADS
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
"""Time between two looks at whether the parent is still there."""
REMOVALS = 100
"""Most times that a folder is removed before it is left."""


def serve(pipe: Connection, threads: int) -> None:
    """Do runs until the other end of the pipe is closed.

    Args:
        pipe: Gives assignments and takes outcomes.
        threads: Of torch; 0 leaves them to torch.
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
    """End this process when its parent was killed: nobody would take what it finds."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    remove(workspace)
    os._exit(1)


def remove(workspace: Path) -> None:
    """Remove the workspace, also while a run is writing into it."""
    for _ in range(REMOVALS):
        shutil.rmtree(workspace, ignore_errors=True)
        if not workspace.exists():
            return


def main(pipe: int, workspace: Path, threads: int, parent: int) -> None:
    """Serve as what the command line of the process says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    threading.Thread(target=watch, args=(parent, workspace), daemon=True).start()
    serve(Connection(pipe), threads)
    remove(workspace)  # a parent that was killed does not


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
