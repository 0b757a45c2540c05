"""Control library output during a verb: show dynlora's warnings as notes, silence transformers.

Standard output is reserved for the verb's result.
"""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console

HUSHED = ("bitsandbytes",)
"""Libraries that log irrelevant remarks on import."""


@contextmanager
def fewer_remarks() -> Iterator[None]:
    """Silence libraries that log on import, except for errors."""
    before = {name: logging.getLogger(name).level for name in HUSHED}
    for name in HUSHED:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


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
    """Show dynlora's warnings as `note:` lines on `console`, and silence transformers.

    Library output to standard output is redirected to standard error, or dropped if `console` is
    quiet.
    """
    sink = io.StringIO() if console.quiet else sys.stderr
    with redirect_stdout(sink), _quiet_libraries(downloads=console.quiet), _notes(console):
        yield


@contextmanager
def _notes(console: Console) -> Iterator[None]:
    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(
                f"note: {record.getMessage()}", highlight=False, markup=False, soft_wrap=True
            )

    logger, handler = logging.getLogger("dynlora"), Notes(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _quiet_libraries(*, downloads: bool) -> Iterator[None]:
    """Silence remarks and progress bars of transformers, and of datasets if `downloads`."""
    from transformers.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if downloads:
        from datasets.utils import logging as data_logging

        data_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        hub_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if downloads:
            data_logging.enable_progress_bar()
