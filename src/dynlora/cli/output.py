"""Where a verb's words go: progress to the standard error, the result to the standard output."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType

PIPED_WIDTH = 100
"""Columns of a table that is not printed on a terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How to show what a verb says; colours appear on terminals only."""

    as_json: bool
    """Print the result as one JSON object instead of a table."""
    quiet: bool
    """Print no progress, and no table."""
    progress: Console = field(init=False)
    """Where progress and notes are shown."""

    def __post_init__(self) -> None:
        """Open the console for progress."""
        object.__setattr__(self, "progress", Console(stderr=True, quiet=self.quiet))

    def show(self, table: RenderableType, values: Mapping[str, Any]) -> None:
        """Print a verb's result.

        Args:
            table: For people.
            values: The same for scripts, JSON-ready; its keys are a promise.
        """
        if self.as_json:
            print(json.dumps(values))
        elif not self.quiet:
            console = Console()
            (console if console.is_terminal else Console(width=PIPED_WIDTH)).print(table)
