"""What this process takes beside its tensors: Python, libraries, their kernels, data."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from torch import Tensor

import dynlora.train.job  # noqa: F401  a run has loaded all that this loads
from dynlora.train.plan.replay import load_allocator
from dynlora.train.plan.trace import AllocationTrace, left_live, storage_bytes

PEAK_RESET = Path("/proc/self/clear_refs")


def process_bytes(weights: Sequence[Tensor], trace: AllocationTrace) -> int:
    """Return the resident bytes of this process without tensors; 0 on an accelerator.

    Args:
        weights: The only model's parameters and buffers.
        trace: Of all other tensors.
    """
    if trace.device.type != "cpu":
        return 0
    for tensor in weights:
        tensor.sum()  # weights of a file that is mapped into memory come when they are first read
    resident: int = psutil.Process().memory_info().rss
    return resident - storage_bytes(weights) - left_live(trace.events)


def forget_peak() -> None:
    """Let `run_record.peak_resident` begin anew, where the system can (Linux)."""
    with suppress(OSError):
        PEAK_RESET.write_text("5", encoding="ascii")


@contextmanager
def quick_collections() -> Iterator[None]:
    """Leave modules out of garbage collections, each of which would take a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release_free_memory() -> None:
    """Give the system back what the allocator holds and nobody uses, where that is possible."""
    gc.collect()
    library = load_allocator()
    if library is not None:
        library.malloc_trim(0)
