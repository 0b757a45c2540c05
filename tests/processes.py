"""Run commands in child processes that cannot outlive their time limit."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

SECONDS = 240.0
"""Default time limit: less than the `timeout` per test, so that the error names the command."""


@contextmanager
def process_group(command: Sequence[Any], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process in its own process group, and kill all of it at the end of the block.

    Kills the descendants in other groups too, because torchrun starts each worker in a new session.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            descendants = []
            with suppress(psutil.NoSuchProcess):
                descendants = psutil.Process(process.pid).children(recursive=True)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for descendant in descendants:
                with suppress(psutil.NoSuchProcess):
                    descendant.kill()


def run_in_group(
    command: Sequence[Any],
    *,
    timeout: float = SECONDS,
    check: bool = False,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command as `subprocess.run` does, and kill all its processes at the end."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process_group(command, **options) as process:
        output, errors = process.communicate(timeout=timeout)
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done
