"""The machine of a run: its one device, its peak memory, and freed memory that stays."""

import ast
import os
import platform
import sys

import pytest
import torch
from rich.console import Console

from dynlora.errors import EngineError
from dynlora.train import job
from dynlora.train.config import DataConfig, JobConfig, ModelConfig
from dynlora.train.machine import SETTINGS, keep_freed_memory, machine, peak_memory
from tests.processes import run_in_group

PROGRAM = """
import resource
import torch
from dynlora.train.machine import keep_freed_memory

def faults():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**24), *(torch.ones(2**20) for _ in range(20))]  # 64 and 4 MiB
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose setting this is")
def test_pages_that_a_step_has_freed_are_not_cleared_again_for_the_next():
    clean = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    command = [sys.executable, "-c", PROGRAM]
    done = run_in_group(command, env=clean, capture_output=True, text=True, check=True)
    cleared, changed, still_cleared = done.stdout.split()
    assert changed == "True"
    assert int(still_cleared) < 0.2 * int(cleared)


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


@pytest.mark.parametrize(
    ("processes", "gpus", "told"),
    [
        ("4", 0, "one process, got WORLD_SIZE='4', and several would all write"),
        ("two", 0, "one process, got WORLD_SIZE='two'"),
        ("1", 2, "one GPU at most, got 2, .*: set CUDA_VISIBLE_DEVICES"),
    ],
)
def test_several_processes_or_gpus_are_refused_before_anything_is_written(
    processes, gpus, told, monkeypatch, tmp_path
):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    output = tmp_path / "run"
    config = JobConfig(
        output=str(output), model=ModelConfig(name="a/b"), data=DataConfig(name="c/d")
    )
    with pytest.raises(EngineError, match=told):
        job.run_job(config, Console())
    assert not output.exists()


def test_the_machine_is_described():
    found = machine()
    assert set(found) == {"platform", "cpus", "threads", "gpu"}
    assert min(int(found["cpus"]), int(found["threads"])) >= 1


def test_the_peak_is_in_bytes_and_of_this_process_not_of_its_parent():
    before = peak_memory()["peak_memory_bytes"]
    ballast = b"x" * 2**30  # so that this process has more than the other will
    script = "from dynlora.train.machine import peak_memory; print(peak_memory())"
    command = [sys.executable, "-W", "ignore", "-c", script]
    told = run_in_group(command, capture_output=True, text=True, check=True).stdout
    peak = ast.literal_eval(told.splitlines()[-1])["peak_memory_bytes"]
    after = peak_memory()["peak_memory_bytes"]
    assert 10**7 < peak < len(ballast) < after < 2**40
    assert before <= after
