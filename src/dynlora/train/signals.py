"""Signals: SIGTERM ends a command as Ctrl-C does, so that it can clean up."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
def handling(handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Handle signals inside the block; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def sigterm_stops() -> AbstractContextManager[None]:
    """Raise `Stopped` on SIGTERM inside a block; keep an existing handler."""
    unhandled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return handling({signal.SIGTERM: stop_at_once} if unhandled else {})
