"""What libraries say while a verb runs: our own warnings as notes, transformers' remarks not.

The standard output is for the verb's result alone.
"""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

from rich.console import Console

HUSHED = ("bitsandbytes",)
"""Libraries that remark, when loaded, on what does not concern who runs a verb."""


@contextmanager
def fewer_remarks() -> Iterator[None]:
    """Silence libraries that speak up as soon as they are loaded, but for their errors."""
    loggers = [logging.getLogger(name) for name in HUSHED]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def only_errors() -> Iterator[None]:
    """Let no warning of any library through, and no log line below an error."""
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
    """Show our own warnings as `note:` lines on `console`, and silence transformers.

    What libraries print on the standard output goes to where progress goes: nowhere, if that
    console is quiet.
    """
    sink = io.StringIO() if console.quiet else sys.stderr
    downloads = _quiet_datasets() if console.quiet else nullcontext()
    with redirect_stdout(sink), _quiet_transformers(), downloads, _notes(console):
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
def _quiet_transformers() -> Iterator[None]:
    """Silence progress bars and remarks, which the verb's own output replaces."""
    from transformers.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        hub_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Show no progress of downloads."""
    from datasets.utils import logging as data_logging

    data_logging.disable_progress_bar()
    try:
        yield
    finally:
        data_logging.enable_progress_bar()
