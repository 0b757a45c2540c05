"""`dynlora --version`: the version, and the environment that a bug report needs.

Nothing is imported for it, so that it appears at once: torch alone would take seconds.
"""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dynlora.cli.output import Output
from dynlora.release import release

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "bitsandbytes",
    "safetensors",
    "gguf",
    "tensorboard",
    "wandb",
    "trackio",
)
NVIDIA = Path("/proc/driver/nvidia/version")
"""Where Linux tells the version of NVIDIA's driver."""


def run(_arguments: Sequence[str], output: Output) -> None:
    """Print the versions of what decides a run's result, and what it would run on."""
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
