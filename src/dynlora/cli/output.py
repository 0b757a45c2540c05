"""Output of a verb: progress on standard error, the result on standard output."""

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
"""Minimum number of columns without a terminal."""


class ReaderLeftError(Exception):
    """The reader of the output, such as `head`, closed the pipe."""


class PipeConsole(Console):
    """`rich.console.Console` that raises an error when a pipe is closed."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise an error instead of exiting the process as rich does.

        Raises:
            ReaderLeftError: Always.
        """
        raise ReaderLeftError


class ProgressConsole(PipeConsole):
    """Shows progress until printing fails, so that a full disk under a log does not stop a run."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as rich does; become quiet after the first failure."""
        try:
            super().print(*objects, **settings)
        except OSError:
            self.quiet = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Prints a verb's progress and result; in colour on terminals, or if rich is configured so."""

    as_json: bool
    """Whether to print the result as one JSON object instead of a table."""
    quiet: bool
    """Whether to omit progress and table."""
    progress: Console = field(init=False)
    """Console for progress and notes."""
    result: TextIO = field(init=False)
    """Standard output at the start, because libraries may redirect it later."""

    def __post_init__(self) -> None:
        """Open the streams for progress and result."""
        object.__setattr__(self, "progress", ProgressConsole(stderr=True, quiet=self.quiet))
        # The process may have no standard output.
        object.__setattr__(self, "result", sys.stdout or io.StringIO())
        # As on standard error: names from files may contain characters that cannot be encoded.
        if isinstance(self.result, io.TextIOWrapper):
            self.result.reconfigure(errors="backslashreplace")

    def show(self, table: RenderableType, values: Mapping[str, Any]) -> None:
        """Print a verb's result.

        Args:
            table: The result for people.
            values: The result for scripts, JSON-ready except that non-finite numbers become null.
                Its keys are a stable interface.

        Raises:
            ConfigError: If standard output cannot be written.
            ReaderLeftError: If its reader closed the pipe.
        """
        if self.as_json:
            self.line(to_json(values))
        elif not self.quiet:
            with self._writing():
                self._console(table).print(table)

    def write(self, text: str, values: Mapping[str, Any]) -> None:
        """Print the content of a file, even with `--quiet`; raises as `show` does.

        Args:
            text: The file's content.
            values: The result for `--json`.
        """
        self.line(to_json(values) if self.as_json else text)

    def line(self, text: str) -> None:
        """Print a line and flush it; raises as `show` does."""
        with self._writing():
            print(text, file=self.result)

    def finish(self) -> None:
        """Flush the result; raises as `show` does."""
        with self._writing():
            pass

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
            self.result.flush()
        except (BrokenPipeError, ReaderLeftError) as error:
            self._drop_rest()
            raise ReaderLeftError from error
        except OSError as error:
            self._drop_rest()
            raise ConfigError(
                f"standard output must be writable, but got {error.strerror or error}. Free some "
                "space, or redirect it."
            ) from error

    def _drop_rest(self) -> None:
        """Send unwritten output to the null device, because Python flushes again at exit."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.result.fileno())
        os.close(nowhere)

    def _console(self, table: RenderableType) -> Console:
        """Return a console that truncates nothing unless a terminal's width requires it."""
        console = PipeConsole(file=self.result)
        if self.result.isatty() or "COLUMNS" in os.environ:
            return console
        endless = console.options.update(width=10_000)
        width = Measurement.get(console, endless, table).maximum
        return PipeConsole(file=self.result, width=max(PIPED_WIDTH, width))
