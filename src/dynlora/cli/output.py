"""Output of a verb: progress on standard error, the result on standard output."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any, NoReturn, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from dynlora.errors import ConfigError
from dynlora.files.json_files import to_json

ENDLESS = 10_000  # columns without a terminal, where nothing is wrapped


class ReaderLeftError(Exception):
    """The reader of the output, such as `head`, closed the pipe."""

    code = 141  # as of programs ended by a closed pipe: 128 plus 13, the number of SIGPIPE


class PipeConsole(Console):
    """`rich.console.Console` that raises `ReaderLeftError` when a pipe is closed."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise an error instead of exiting the process as rich does."""
        raise ReaderLeftError


class ProgressConsole(PipeConsole):
    """Shows progress until printing fails, so that a full disk under a log does not stop a run."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as rich does; become quiet after the first failure."""
        try:
            super().print(*objects, **settings)
        except OSError:
            self.quiet = True
            drop_pending(sys.stderr)


def drop_pending(stream: TextIO) -> None:
    """Drop a stream's unwritten text, which Python would flush again at exit."""
    kept = os.dup(stream.fileno())
    drop_rest(stream)
    try:
        stream.flush()
    finally:
        os.dup2(kept, stream.fileno())
        os.close(kept)


def drop_rest(stream: TextIO) -> None:
    """Send a stream's unwritten and later text to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Output:
    """Prints a verb's progress and result; in colour on terminals, or if rich is configured so."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        """Open the streams; `as_json` prints a JSON object, `quiet` neither progress nor table."""
        self.as_json, self.quiet = as_json, quiet
        # Names of files may look like rich's markup or emoji.
        self.progress: Console = ProgressConsole(
            stderr=True, quiet=quiet, markup=False, highlight=False, emoji=False
        )
        # Standard output before libraries redirect it; the process may have none.
        self.result: TextIO = sys.stdout or io.StringIO()
        # As on standard error: names from files may contain characters that cannot be encoded.
        if isinstance(self.result, io.TextIOWrapper):
            self.result.reconfigure(errors="backslashreplace")

    def show(self, table: RenderableType, values: Mapping[str, Any]) -> None:
        """Print a verb's result: `table` for people, or `values` for scripts.

        The keys of `values` are a stable interface; non-finite numbers become null. Raises
        `ConfigError` if standard output cannot be written, and `ReaderLeftError` if its reader
        closed the pipe.
        """
        if self.as_json:
            self.line(to_json(values))
        elif not self.quiet:
            fits = self.result.isatty() or "COLUMNS" in os.environ
            with self._writing():
                PipeConsole(file=self.result, width=None if fits else ENDLESS).print(table)

    def write(self, text: str, values: Mapping[str, Any]) -> None:
        """Print a file's content, or `values` with `--json`, even with `--quiet`; see `show`."""
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
            drop_rest(self.result)
            raise ReaderLeftError from error
        except OSError as error:
            drop_rest(self.result)
            raise ConfigError(
                f"standard output must be writable, but got {error.strerror or error}. Free some "
                "space, or redirect it."
            ) from error


def layer_table(
    title: str,
    columns: Mapping[str, tuple[str, str]],
    layers: Iterable[Mapping[str, Any]],
    notes: str = "",
) -> Table:
    """Return a table with a row per layer, and notes below.

    `columns` has by heading the format of a layer's values, such as `{rank}`, and the footer. The
    first one, the name, may be folded.
    """
    table = Table(title=Text(title), title_justify="left", show_footer=True, box=None)
    table.caption, table.caption_justify = Text(notes), "left"
    for heading, (_, footer) in columns.items():
        if not table.columns:
            table.add_column(heading, footer, overflow="fold")
        else:
            table.add_column(heading, footer, justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(*(Text(cell.format_map(layer)) for cell, _ in columns.values()))
    return table


def note(console: Console, text: str) -> None:
    """Print a line `note: ...`."""
    console.print(f"note: {text}", soft_wrap=True)


@contextmanager
def only_errors() -> Iterator[None]:
    """Suppress all warnings and all log lines below errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def readable_messages(console: Console) -> Iterator[None]:
    """Show dynlora's messages on `console`, warnings as `note:` lines, and silence transformers.

    Library output to standard output is redirected to standard error. If `console` is quiet, it is
    dropped, and progress bars of datasets too.
    """
    from transformers.utils import logging as transformers_logging

    def emit(record: logging.LogRecord) -> None:
        prefix = "note: " if record.levelno >= logging.WARNING else ""
        console.print(prefix + record.getMessage(), soft_wrap=True)

    logger, messages = logging.getLogger("dynlora"), logging.Handler()
    messages.emit = emit  # type: ignore[method-assign]
    libraries: list[Any] = [transformers_logging]
    if console.quiet:
        from datasets.utils import logging as datasets_logging

        libraries.append(datasets_logging)
    with ExitStack() as stack:
        logger.addHandler(messages)
        stack.callback(logger.removeHandler, messages)
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.INFO)
        stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity(logging.ERROR)
        for library in libraries:
            library.disable_progress_bar()
            stack.callback(library.enable_progress_bar)
        with redirect_stdout(io.StringIO() if console.quiet else sys.stderr):
            yield
