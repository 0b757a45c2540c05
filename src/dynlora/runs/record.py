"""Write `run.json`: the settings, environment, metrics and status of a run."""

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
from dynlora.runs.release import release

STATUS = Path("/proc/self/status")
"""Status of this process on Linux."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The values of `run.json`, and its path."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def update(self, **values: Any) -> None:
        """Set values, and rewrite the file with the current time."""
        self.values.update(values, written=datetime.now(UTC).isoformat(timespec="seconds"))
        write_json(self.path, self.values)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run's result."""
    found = {"python": platform.python_version(), "dynlora": release()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


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
    return {
        "peak_memory_bytes": peak_resident(),
        "peak_gpu_memory_bytes": (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
    }


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes.

    Prefers `VmHWM`, because Linux includes the parent's memory at the fork in `ru_maxrss`.
    """
    if STATUS.is_file():
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        kibibytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        if kibibytes:
            return int(kibibytes[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, else KiB
