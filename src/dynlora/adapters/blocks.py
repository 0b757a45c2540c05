"""Layers in blocks: many at once, so that a GPU is asked little, but not all: that takes memory."""

from collections.abc import Iterable, Iterator

from dynlora.adapters.layers import LoraView
from dynlora.samples import SAMPLE_SIZE

WORKING_BYTES = 2**27
"""About how much memory an event takes for what it computes of many layers at once, in float64; of
one layer alone it may be more."""


def in_blocks(layers: Iterable[LoraView]) -> Iterator[list[LoraView]]:
    """Yield layers in their order, as many at once as take about `WORKING_BYTES`, at least one."""
    block: list[LoraView] = []
    used = 0
    for layer in layers:
        needed = 8 * (SAMPLE_SIZE * layer.in_features + 2 * layer.r * layer.cost)
        if block and used + needed > WORKING_BYTES:
            yield block
            block, used = [], 0
        block.append(layer)
        used += needed
    if block:
        yield block
