"""`run.json`: what a run was and how it ended, rewritten whenever something is known."""

import os
import platform
import resource
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dynlora.train.run_folder import write_json

PACKAGES = ("dynlora", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The file and the values in it."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def update(self, **values: Any) -> None:
        """Set some values and write the file anew."""
        self.values.update(values)
        write_json(self.path, self.values)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, str | int]:
    """Return what a reader must know of the machine to compare seconds."""
    return {"platform": platform.platform(), "cpus": os.cpu_count() or 1}


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes elsewhere
