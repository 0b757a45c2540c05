"""Starts several processes on this machine, as a user would: with torchrun."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.processes import run_in_group

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
