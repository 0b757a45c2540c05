"""Where a verb's words go: progress to the standard error, the result to the standard output."""

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TextIO

from rich.console import Console, RenderableType
from rich.measure import Measurement

from dynlora.errors import ConfigError
from dynlora.files.json_files import to_json

PIPED_WIDTH = 100
"""Least columns of what is not printed on a terminal."""


class ReaderLeftError(Exception):
    """Who reads what a verb says, such as `head`, has seen enough and closed the pipe."""


class PipeConsole(Console):
    """`rich.console.Console` that leaves it to the caller to end when a pipe is closed."""

    def on_broken_pipe(self) -> NoReturn:
        """Say that there is no reader, instead of ending the process as rich does.

        Raises:
            ReaderLeftError: Always.
        """
        raise ReaderLeftError


class ProgressConsole(PipeConsole):
    """Shows progress for as long as somebody takes it: a full disk under a log costs no run."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as rich does, and nothing more once that has failed."""
        try:
            super().print(*objects, **settings)
        except OSError:
            self.quiet = True


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
        object.__setattr__(self, "progress", ProgressConsole(stderr=True, quiet=self.quiet))
        # There is none where a process was started without.
        object.__setattr__(self, "result", sys.stdout or io.StringIO())
        # As on the standard error: a name out of a file, or of one, may hold no letter at all.
        if isinstance(self.result, io.TextIOWrapper):
            self.result.reconfigure(errors="backslashreplace")

    def show(self, table: RenderableType, values: Mapping[str, Any]) -> None:
        """Print a verb's result.

        Args:
            table: For people.
            values: The same for scripts, JSON-ready but for numbers that are not finite, which
                become null; its keys are a promise.

        Raises:
            ConfigError: If the standard output cannot be written.
            ReaderLeftError: If its reader has closed it.
        """
        if self.as_json:
            self.line(to_json(values))
        elif not self.quiet:
            with self._writing():
                self._console(table).print(table)

    def write(self, text: str, values: Mapping[str, Any]) -> None:
        """Print a text that is meant for a file, `--quiet` or not.

        Args:
            text: The file's content.
            values: The same for `--json`.

        Raises:
            ConfigError: If the standard output cannot be written.
            ReaderLeftError: If its reader has closed it.
        """
        self.line(to_json(values) if self.as_json else text)

    def line(self, text: str) -> None:
        """Print a line, which its reader sees at once.

        Raises:
            ConfigError: If the standard output cannot be written.
            ReaderLeftError: If its reader has closed it.
        """
        with self._writing():
            print(text, file=self.result)

    def finish(self) -> None:
        """See to it that all is written, whoever printed it.

        Raises:
            ConfigError: If the standard output cannot be written.
            ReaderLeftError: If its reader has closed it.
        """
        with self._writing():
            pass

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
            self.result.flush()
        except BrokenPipeError as error:
            self._drop_rest()
            raise ReaderLeftError from error
        except ReaderLeftError:
            self._drop_rest()
            raise
        except OSError as error:
            self._drop_rest()
            raise ConfigError(
                f"the standard output must take the result, got {error.strerror or error}: make "
                "room, or send it elsewhere."
            ) from error

    def _drop_rest(self) -> None:
        """Let what could not be written go nowhere: Python tries again when the process ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.result.fileno())
        os.close(nowhere)

    def _console(self, table: RenderableType) -> Console:
        """Return a console on which nothing is cut short unless a terminal's width demands it."""
        console = PipeConsole(file=self.result)
        if self.result.isatty() or "COLUMNS" in os.environ:
            return console
        endless = console.options.update(width=10_000)
        width = Measurement.get(console, endless, table).maximum
        return PipeConsole(file=self.result, width=max(PIPED_WIDTH, width))
