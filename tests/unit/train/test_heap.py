"""Freed memory stays with the process: counted in page faults, in a process of its own."""

import os
import platform
import sys

import pytest
from rich.console import Console

from dynlora.train import job
from dynlora.train.config import DataConfig, JobConfig, ModelConfig
from dynlora.train.heap import SETTINGS, keep_freed_memory
from tests.processes import run_in_group

PROGRAM = """
import resource, sys
import torch
from dynlora.train.heap import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**24), *(torch.ones(2**20) for _ in range(20))]  # 64 MiB, and 20 of 4
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs glibc, whose setting this is"
)


def faults(mode: str) -> int:
    """Return how many pages the system had to clear in the last of four rounds of the same."""
    clean = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    command = [sys.executable, "-c", PROGRAM, mode]
    done = run_in_group(command, env=clean, capture_output=True, text=True, check=True)
    return int(done.stdout)


@glibc
def test_pages_that_a_step_has_freed_are_not_cleared_again_for_the_next():
    assert faults("keep") < 0.2 * faults("leave")


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_environment_says_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def test_a_job_on_a_cpu_keeps_freed_memory(monkeypatch):
    kept = []
    config = JobConfig(output="out", model=ModelConfig(name="a/b"), data=DataConfig(name="c/d"))
    monkeypatch.setattr(job, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(job, "build_job", stop)
    with pytest.raises(KeyboardInterrupt):
        job.run_job(config, Console())
    assert kept == [True]


def stop(*_):
    raise KeyboardInterrupt
