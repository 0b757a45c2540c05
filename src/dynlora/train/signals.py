"""Signals: SIGTERM ends a command as Ctrl-C does, so that it can clean up."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Stopped(KeyboardInterrupt):
    """A signal has stopped the command; the text says how to continue, if that is possible."""

    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.signum = signum


class ReportedError(Exception):
    """Another process has reported why this command ends, and with which exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def stop_at_once(signum: int, _: FrameType | None) -> NoReturn:
    """Handle a signal by raising `Stopped`."""
    raise Stopped("", signum)


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM in the main thread; keep an existing handler."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
