"""A trace of allocations through this machine's allocator: how much of the process it takes.

Run as a script in a process of its own, whose heap is empty: the parts of a trace on its standard
input, the most bytes held in each on its standard output. Nothing of ours or torch is imported.
Memory is reserved and never touched, so the replay of 100 GB takes next to none.

An allocator holds more than is allocated: a freed block between two live ones cannot go back to the
system. How much depends on sizes and order, which only the allocator itself knows.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ALIGNMENT = 64
"""Of torch's tensors on a CPU, in bytes."""
LARGE = 2**16
"""Only after allocations of this size it is worth asking how much is held, in bytes."""


class HeapFigures(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def load_allocator() -> ctypes.CDLL | None:
    """Return the C library, if it is one that tells what its allocator holds (glibc 2.33 on)."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = HeapFigures
        library.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
    except (AttributeError, OSError, TypeError):
        return None
    return library


def replay(library: ctypes.CDLL, parts: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """Allocate and free as a trace says, and return the most bytes held in each of its parts."""

    def held() -> int:
        figures = library.mallinfo2()
        return int(figures.arena + figures.hblkhd)

    start, most = held(), []
    blocks: dict[int, ctypes.c_void_p] = {}
    for events in parts:
        most.append(held() - start)
        for number, size in events:
            if size < 0:
                library.free(blocks.pop(number))
                continue
            block = blocks[number] = ctypes.c_void_p()
            if library.posix_memalign(ctypes.byref(block), ALIGNMENT, max(size, 1)) != 0:
                raise MemoryError(f"{size} bytes could not be reserved")
            if size >= LARGE:
                most[-1] = max(most[-1], held() - start)
    return most


def most_held(parts: Sequence[Sequence[tuple[int, int]]]) -> list[int] | None:
    """Replay a trace in a process of its own; None where the allocator tells nothing."""
    if load_allocator() is None:
        return None
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__))],
        input=json.dumps([list(events) for events in parts]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return None
    most: list[int] = json.loads(done.stdout)
    return most


if __name__ == "__main__":
    allocator = load_allocator()
    assert allocator is not None
    print(json.dumps(replay(allocator, json.load(sys.stdin))))
