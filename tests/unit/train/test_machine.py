"""The machine of a run: its peak memory, and freed memory that stays."""

import os
import platform
import sys

import pytest

from dynlora.train.machine import SETTINGS, keep_freed_memory, peak_memory
from tests.processes import run_in_group

PROGRAM = """
import resource
import torch
from dynlora.train.machine import keep_freed_memory, peak_memory

def faults():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**24), *(torch.ones(2**20) for _ in range(20))]  # 64 and 4 MiB
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(peak_memory()["peak_memory_bytes"], faults(), keep_freed_memory(), faults())
"""


def test_a_childs_peak_is_its_own_and_pages_that_it_frees_are_not_cleared_again():
    before = peak_memory()["peak_memory_bytes"]
    ballast = b"x" * 2**30  # so that this process has more than the other will
    after = peak_memory()["peak_memory_bytes"]
    clean = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = run_in_group(command, env=clean, capture_output=True, text=True, check=True)
    peak, cleared, changed, still_cleared = done.stdout.split()[-4:]
    assert 10**7 < int(peak) < len(ballast) < after < 2**40
    assert before <= after
    assert changed == str(platform.libc_ver()[0] == "glibc")
    if changed == "True":
        assert int(still_cleared) < 0.2 * int(cleared)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_environment_says_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()
