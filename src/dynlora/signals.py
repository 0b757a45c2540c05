"""Signals that end a command: SIGTERM does so as Ctrl-C does, so that nothing is left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Stopped(KeyboardInterrupt):
    """A signal has ended what was under way."""

    def __init__(self, text: str, signum: int) -> None:
        """Take what to say of it.

        Args:
            text: How to go on; empty where there is nothing to go on with.
            signum: The signal.
        """
        super().__init__(text)
        self.signum = signum


def stop_at_once(signum: int, _: FrameType | None) -> NoReturn:
    """End what is under way.

    Raises:
        Stopped: Always.
    """
    raise Stopped("", signum)


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """Let SIGTERM raise `Stopped`; a handler of somebody else's stays."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
