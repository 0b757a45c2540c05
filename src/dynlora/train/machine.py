"""The machine of a run: its description, its memory, and the one device that a run may use."""

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from dynlora.errors import EngineError

STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `man 3 mallopt`. Setting only one would fix the other at 128 KiB."""
_ALWAYS = 2**31 - 1
LARGEST_BLOCK = 2**30  # size in bytes above which freed blocks still return to the system
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables that take precedence."""


def check_one_device() -> None:
    """Check that the command has one process and at most one GPU."""
    processes, gpus = os.environ.get("WORLD_SIZE", "1"), torch.cuda.device_count()
    if processes != "1":
        raise EngineError(
            f"this command must run in one process, got WORLD_SIZE={processes[:20]!r}: unset it. "
            "Only `dynlora train` runs in several, which torchrun or `--processes N` must start."
        )
    if gpus > 1:
        raise EngineError(
            f"one process must see one GPU at most, got {gpus}, between which each batch would be "
            f"split: use them all with `dynlora train CONFIG --processes {gpus}`, or set "
            "CUDA_VISIBLE_DEVICES to the number of one, such as 0."
        )


def machine() -> dict[str, str | int]:
    """Return the properties of the machine that affect timings."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def peak_memory() -> dict[str, int | None]:
    """Return the peak memory so far in bytes: resident in this process, and on its GPU."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_memory_bytes": peak_resident(), "peak_gpu_memory_bytes": gpu}


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes."""
    if STATUS.is_file():  # Linux includes the parent's memory at the fork in `ru_maxrss`
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        kibibytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        if kibibytes:
            return int(kibibytes[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, else KiB


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next step, which raises peak memory by a few percent.

    By default glibc returns blocks above 32 MiB and free memory at the top of the heap to the
    system, which clears every page before the next step can use it. Returns whether the setting was
    changed: False with another C library, or if the environment configures glibc.
    """
    if any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc; `CDLL(None)` fails on Windows
        return False
    told = mallopt(_M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _ALWAYS)
    return bool(told)
