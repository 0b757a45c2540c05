"""Memory that one step has freed is kept for the next; glibc would give it back to the system.

Activations of megabytes are freed in every backward pass. What is free at the top of the heap, and
any block above 32 MiB, glibc returns at once; the next step asks for the same pages, and the system
clears each before it hands it out. `docs/performance.md` times steps with and without.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of `mallopt`, see `man 3 mallopt`. Setting one alone would fix the other at 128 KiB."""
_ALWAYS = 2**31 - 1
LARGEST_BLOCK = 2**30
"""Bytes from which on a block is still the system's own."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which a user may have chosen otherwise."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep what this process frees; it costs a few percent of peak memory.

    Returns:
        Whether it was told: not if the environment says otherwise, and not with another C library.
    """
    if any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc; on Windows there is no such handle
        return False
    told = mallopt(_M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _ALWAYS)
    return bool(told)
