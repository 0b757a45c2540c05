"""Run commands and functions in child processes that cannot outlive their time limit."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

SECONDS = 240.0
"""Default time limit: less than the `timeout` per test, so that the error names the command."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["dynlora.train.job", "transformers.trainer", "tests.models"])


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


def run_in_fork(
    function: Callable[..., int], *arguments: Any, timeout: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Call a function in a fork of a process that has loaded torch, which takes seconds.

    Args:
        function: Function of a module; returns the exit code.
        *arguments: Its arguments, which must be picklable.
        timeout: Seconds after which the process and its children are killed.

    Returns:
        The exit code, negative after a signal, and both output streams as the standard error.

    Raises:
        TimeoutExpired: If the process was killed because of its time limit.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # if it has no group of its own yet

    reader, writer = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_write_into, args=(writer, function, arguments))
    process.start()
    writer.close()
    limit = threading.Timer(timeout, expire)
    limit.start()
    with os.fdopen(reader.fileno(), "rb", closefd=False) as file:
        said = file.read().decode()
    process.join()
    limit.cancel()
    if expired.is_set():
        raise subprocess.TimeoutExpired(function.__name__, timeout, said)
    return subprocess.CompletedProcess(function.__name__, process.exitcode or 0, "", said)


def _write_into(writer: Any, function: Callable[..., int], arguments: Sequence[Any]) -> None:
    os.setsid()
    gc.freeze()  # or a collection would copy the whole memory of the server
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(writer.fileno(), number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))
    sys.exit(function(*arguments))
