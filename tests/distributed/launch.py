"""Starts several processes on this machine, as a user would with torchrun, or as its forks."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from tests.processes import run_in_fork, run_in_group

NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="needs DeepSpeed: `make deepspeed` installs it and runs these tests",
)


def run_in_processes(module: str, *arguments: object, count: int = 2) -> None:
    """Run a module in several processes, which find each other by themselves."""
    done = end_in_processes(module, *arguments, count=count)
    assert done.returncode == 0, done.stderr[-4000:]


def end_in_processes(
    module: str, *arguments: object, count: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run a module in several processes, and return how that ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return run_in_group(command, capture_output=True, text=True, env=environment)


def fork_group(
    function: Callable[..., int], *arguments: Any, count: int = 2
) -> tuple[list[int], str]:
    """Call a function in forks that find each other as torchrun's processes do.

    Returns:
        Their exit codes by rank, negative after a signal, and all that they printed.
    """
    done = run_in_fork(_fork_all, function, arguments, count)
    said, _, codes = done.stderr.rpartition("exit codes: ")
    return [int(code) for code in codes.split()], said


def _fork_all(function: Callable[..., int], arguments: tuple[Any, ...], count: int) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [os.fork() or _work(rank, port, function, arguments, count) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    print("exit codes:", *codes)
    return 0


def _work(
    rank: int, port: int, function: Callable[..., int], arguments: tuple[Any, ...], count: int
) -> int:
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | size | own
    os._exit(function(*arguments))
