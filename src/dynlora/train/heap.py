"""Make glibc keep freed memory for the next step.

By default glibc returns blocks above 32 MiB and free memory at the top of the heap to the system,
which clears every page before the next step can use it. See `docs/performance.md` for timings.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `man 3 mallopt`. Setting only one would fix the other at 128 KiB."""
_ALWAYS = 2**31 - 1
LARGEST_BLOCK = 2**30
"""Size in bytes above which freed blocks still return to the system."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables that take precedence."""


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory, which raises peak memory by a few percent.

    Returns:
        Whether the setting was changed: False with another C library, or if the environment
        configures glibc.
    """
    if any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc; `CDLL(None)` fails on Windows
        return False
    told = mallopt(_M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _ALWAYS)
    return bool(told)
