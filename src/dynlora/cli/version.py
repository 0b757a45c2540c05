"""`dynlora --version`: the version, and the environment that a bug report needs."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table

from dynlora.cli.output import Output

PACKAGES = (
    "dynlora",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "bitsandbytes",
    "safetensors",
)


def run(_arguments: Sequence[str], output: Output) -> None:
    """Print the versions of what decides a run's result; nothing is imported for it."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {package: _installed(package) for package in PACKAGES}
    table = Table.grid(padding=(0, 2))
    for name in ("dynlora", *(name for name in found if name != "dynlora")):
        table.add_row(name, found[name])
    output.show(table, found)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
