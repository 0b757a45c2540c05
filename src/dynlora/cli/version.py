"""`dynlora --version`: print the version and the environment for bug reports.

It imports no libraries, because torch alone takes seconds.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dynlora.cli.output import Output
from dynlora.runs.release import release

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes",
    "safetensors", "gguf", "tensorboard", "wandb", "trackio",
)  # fmt: skip
NVIDIA = Path("/proc/driver/nvidia/version")
"""File with the NVIDIA driver's version on Linux."""


def run(output: Output) -> None:
    """Print the versions of all relevant packages, and the machine."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count() or "unknown"),
        "threads": os.environ.get("OMP_NUM_THREADS") or "as torch chooses",
        "nvidia driver": _nvidia_driver(),
    }
    found |= {package: _installed(package) for package in PACKAGES} | {"dynlora": release()}
    table = Table.grid(padding=(0, 2))
    for name in ("dynlora", *(name for name in found if name != "dynlora")):
        table.add_row(name, Text(found[name]))
    output.show(table, found)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _nvidia_driver() -> str:
    try:
        return NVIDIA.read_text(encoding="utf-8").partition("\n")[0].removeprefix("NVRM version: ")
    except OSError:
        return "none found"
