"""A process that reads hostile files: little memory, little time, and it may crash.

One process serves many files, since starting it takes longer than to read hundreds.
"""

import math
import multiprocessing
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

ROOM = 512 * 2**20
"""Bytes of address space that reading may take beyond what the process has when warm."""
SECONDS = 1.0
"""Processor time that one file may take."""
MOST_SECONDS = 1
"""Processor time after which a process is ended: it may be in a loop without end."""
PATIENCE = 120.0
"""Seconds after which a process counts as waiting for ever; much more than the above, since the
machine may be busy."""
START = 300.0
"""Seconds in which a process must have read its first files; it loads libraries for them."""
STATUS = Path("/proc/self/statm")
"""Where Linux says how many pages a process has."""
Read = Callable[..., list[str]]
"""Reads a file and returns the texts of the named errors that it met; none if all is well."""


class LimitedProcess:
    """The process; a new one is started where the last one died."""

    def __init__(self, read: Read, *warm: tuple[object, ...]) -> None:
        """Start it, and call `read` with each of `warm` before memory is limited."""
        self._given = read, warm
        self._start()

    def read(self, *arguments: object) -> list[str]:
        """Return the named errors; fail if reading crashed, took too long or ended the process."""
        if not self._process.is_alive():
            self._start()
        self._pipe.send(arguments)
        said, crash, seconds = self._answer(PATIENCE)
        assert crash is None, crash
        assert seconds < SECONDS, f"took {seconds:.2f} s of processor time"
        return said

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(*self._given, theirs), daemon=True)
        self._process.start()
        theirs.close()
        said, crash, _ = self._answer(START)
        assert (said, crash) == ([], None), (said, crash)

    def _answer(self, patience: float) -> tuple[list[str], str | None, float]:
        """Return the texts, the crash, and the seconds of the last call."""
        try:
            if self._pipe.poll(patience):
                answer: tuple[list[str], str | None, float] = self._pipe.recv()
                return answer
            why = f"was not done after {patience} s"
        except EOFError:
            self._process.join()
            why = f"ended the process with exit code {self._process.exitcode}"
        self.close()
        return [], why, 0.0


def _serve(read: Read, warm: Sequence[tuple[object, ...]], pipe: Connection) -> None:
    first = [_try(read, arguments) for arguments in warm]
    pipe.send(next((answer for answer in first if answer[:2] != ([], None)), ([], None, 0.0)))
    _limit_memory()
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        _limit_seconds()
        pipe.send(_try(read, arguments))


def _limit_seconds() -> None:
    most = math.ceil(time.process_time()) + MOST_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not STATUS.is_file():  # elsewhere than on Linux, memory is not limited
        return
    pages = int(STATUS.read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _try(read: Read, arguments: tuple[object, ...]) -> tuple[list[str], str | None, float]:
    said: list[str] = []
    crash, started = None, time.process_time()
    try:
        said = read(*arguments)
    except BaseException:  # noqa: BLE001  whatever it is, it is what the test is about
        crash = traceback.format_exc()[-4000:]
    return said, crash, time.process_time() - started
