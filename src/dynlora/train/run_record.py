"""`run.json`: what a run was and how it ended, rewritten whenever something is known."""

import os
import platform
import resource
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dynlora.files.json_files import write_json
from dynlora.release import release

STATUS = Path("/proc/self/status")
"""Where Linux tells about this process."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The file and the values in it."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def update(self, **values: Any) -> None:
        """Set some values and write the file anew, with the time."""
        self.values.update(values, written=datetime.now(UTC).isoformat(timespec="seconds"))
        write_json(self.path, self.values)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's result."""
    found = {"python": platform.python_version(), "dynlora": release()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, str | int]:
    """Return what a reader must know of the machine to compare seconds."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def peak_memory() -> dict[str, int | None]:
    """Return the most memory used so far, in bytes: resident in this process, and on its GPU."""
    return {
        "peak_memory_bytes": peak_resident(),
        "peak_gpu_memory_bytes": (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
    }


def peak_resident() -> int:
    """Return the most bytes that this process had in memory so far.

    Linux counts what the parent process had when it started this one to `ru_maxrss`, but not to
    the status that it shows.
    """
    if STATUS.is_file():
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        kibibytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        if kibibytes:
            return int(kibibytes[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # else kibibytes
