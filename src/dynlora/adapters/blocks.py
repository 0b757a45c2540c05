"""Blocks of layers: several per call to launch fewer kernels, in chunks to bound memory."""

from collections.abc import Iterable, Iterator

from dynlora.adapters.layers import LoraView
from dynlora.samples import SAMPLE_SIZE

WORKING_BYTES = 2**27
"""Approximate memory that an event uses per block of layers, in float64; a single layer may need
more."""


def in_blocks(layers: Iterable[LoraView]) -> Iterator[list[LoraView]]:
    """Yield layers in order, in blocks of about `WORKING_BYTES` and at least one layer."""
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
