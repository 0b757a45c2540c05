"""What libraries say while a verb runs: our own warnings as notes, transformers' remarks not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def readable_messages(console: Console) -> Iterator[None]:
    """Show our own warnings as `note:` lines on `console`, and silence transformers."""
    with _quiet_transformers(), _notes(console):
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
