"""`dynlora train CONFIG`: read the configuration, run the job, print the table at the end."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from dynlora.cli.job_parser import parse_job

KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
"""On a CPU torch generates kernels per shape and keeps 1,024 of them. Layers of different ranks
times batches of different lengths are more, and generating them again slows every step."""


def run(arguments: Sequence[str]) -> None:
    """Run the verb.

    Args:
        arguments: What follows `train` on the command line.

    Raises:
        DynamicLoraError: If the input must be mended.
    """
    config = parse_job(arguments)
    if config is None:
        return

    os.environ.setdefault(*KERNELS)  # read when torch is loaded
    # Only now: these load torch, and `--help` shall not wait for it.
    from dynlora.report.summary import summary_table
    from dynlora.train.job import run_job

    progress = Console(stderr=True)
    with _quiet_libraries(), _notes(progress):
        report = run_job(config, progress)
    Console().print(summary_table(report))


@contextmanager
def _notes(console: Console) -> Iterator[None]:
    """Show our own warnings as lines that begin with `note:`."""

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
def _quiet_libraries() -> Iterator[None]:
    """Silence progress bars and remarks of transformers, which the run's own output replaces."""
    from transformers.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        hub_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
