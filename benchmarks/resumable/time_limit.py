"""A time limit of a process whose work continues in the next one, and the options to run one."""

import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TIME_UP = 2
"""Exit code of a process whose time was up before its work was done."""


class TimeUpError(Exception):
    """The time is up."""


class TimeLimit:
    """Minutes from now."""

    def __init__(self, minutes: float) -> None:
        """Start the clock."""
        self._end = time.monotonic() + 60 * minutes

    def check(self) -> None:
        """Check that time is left.

        Raises:
            TimeUpError: If the time is up.
        """
        if time.monotonic() > self._end:
            raise TimeUpError


def study_options(description: str | None, cache: str) -> ArgumentParser:
    """Return the options of a study in a plain loop; `cache` is the default folder for inputs."""
    parser = ArgumentParser(description=description)
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--cache", type=Path, default=Path(cache))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--show", action="store_true", help="print the number of missing runs")
    return parser


def finish_all(finish: Callable[..., None], pieces: Iterable[tuple[Any, ...]]) -> int:
    """Finish each piece of a study's work until the time is up, and return the exit code."""
    try:
        for piece in pieces:
            finish(*piece)
    except TimeUpError:
        return TIME_UP
    return 0
