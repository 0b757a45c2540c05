"""Where a verb's words go: progress to the standard error, the result to the standard output."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.measure import Measurement

PIPED_WIDTH = 100
"""Least columns of what is not printed on a terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How to show what a verb says; colours appear on terminals only, or where rich is told so."""

    as_json: bool
    """Print the result as one JSON object instead of a table."""
    quiet: bool
    """Print no progress, and no table."""
    progress: Console = field(init=False)
    """Where progress and notes are shown."""
    result: TextIO = field(init=False)
    """The standard output as it is at the start: libraries may find it redirected later."""

    def __post_init__(self) -> None:
        """Open the console for progress."""
        object.__setattr__(self, "progress", Console(stderr=True, quiet=self.quiet))
        object.__setattr__(self, "result", sys.stdout)

    def show(self, table: RenderableType, values: Mapping[str, Any]) -> None:
        """Print a verb's result.

        Args:
            table: For people.
            values: The same for scripts, JSON-ready; its keys are a promise.
        """
        if self.as_json:
            print(json.dumps(values), file=self.result)
        elif not self.quiet:
            self._console(table).print(table)

    def write(self, text: str, values: Mapping[str, Any]) -> None:
        """Print a text that is meant for a file, `--quiet` or not.

        Args:
            text: The file's content.
            values: The same for `--json`.
        """
        print(json.dumps(values) if self.as_json else text, file=self.result)

    def _console(self, table: RenderableType) -> Console:
        """Return a console on which nothing is cut short unless a terminal's width demands it."""
        console = Console(file=self.result)
        if self.result.isatty() or "COLUMNS" in os.environ:
            return console
        endless = console.options.update(width=10_000)
        width = Measurement.get(console, endless, table).maximum
        return Console(file=self.result, width=max(PIPED_WIDTH, width))
