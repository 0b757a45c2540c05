"""The replay of a trace: what this machine's allocator holds for it, and that it takes nothing."""

import psutil
import pytest

from dynlora.train.plan import replay
from dynlora.train.plan.replay import load_allocator, most_held

MEGABYTE = 2**20
needs_figures = pytest.mark.skipif(
    load_allocator() is None, reason="needs an allocator that tells what it holds (glibc)"
)


@needs_figures
def test_large_blocks_take_what_they_are_and_go_back() -> None:
    size = 64 * MEGABYTE
    parts = [[(1, size), (2, size), (1, -1)], [(2, -1), (3, size)]]
    held = most_held(parts)
    assert held is not None
    assert held == pytest.approx([2 * size, size], rel=0.01)


@needs_figures
def test_holes_between_live_blocks_are_held() -> None:
    """Every second block is freed: none of the holes is large enough for what comes then."""
    size = 2 * MEGABYTE
    warm = [(0, 30 * MEGABYTE), (0, -1)]  # from now on blocks of this size come from the heap
    blocks = [(number, size) for number in range(1, 41)]
    freed = [(number, -1) for number in range(1, 41, 2)]
    later = [(number, 3 * size // 2) for number in range(41, 54)]
    held = most_held([[*warm, *blocks, *freed, *later]])
    assert held is not None
    live = 20 * size + 13 * 3 * size // 2
    assert 1.3 * live < held[0] < 2 * live


@needs_figures
def test_a_terabyte_is_replayed_without_taking_memory() -> None:
    before = psutil.virtual_memory().available
    held = most_held([[(number, 2**35) for number in range(8)]])
    assert held is None or held == pytest.approx([2**38], rel=0.01)
    assert psutil.virtual_memory().available > before - 2**31


def test_an_allocator_that_tells_nothing_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "load_allocator", lambda: None)
    assert most_held([[(1, 8)]]) is None


@needs_figures
def test_a_broken_trace_gives_none() -> None:
    assert most_held([[(1, -1)]]) is None
