"""The process that reads hostile files: whatever one does to it, the test is told and goes on."""

import signal
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.fuzz.limited_process import ROOM, STATUS, LimitedProcess


def obey(order: str) -> list[str]:
    """Do what a file could make a reader do."""
    match order:
        case "raise":
            raise KeyError("a bug of ours")
        case "fill memory":
            bytearray(2 * ROOM)
        case "compute":
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
        case "loop":
            while True:
                pass
        case "refuse":
            return ["a named error"]
    return []


@pytest.fixture(scope="module")
def process() -> Iterator[LimitedProcess]:
    with closing(LimitedProcess(obey, ("read",))) as started:
        yield started


@pytest.mark.skipif(not STATUS.is_file(), reason="memory is limited on Linux only")
def test_what_is_no_named_error_is_told_and_the_next_file_is_read(
    process: LimitedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {
        "raise": "KeyError: 'a bug of ours'",
        "compute": r"took 0\.\d+ s of processor time",
        "loop": f"ended the process with exit code -{signal.SIGXCPU}",
        "fill memory": "MemoryError",
    }
    monkeypatch.setattr("tests.fuzz.limited_process.SECONDS", 0.2)
    for order, told in faults.items():
        with pytest.raises(AssertionError, match=told):
            process.read(order)
        assert process.read("refuse") == ["a named error"]
