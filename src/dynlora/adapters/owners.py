"""Which controller moves an adapter's ranks: the last that was attached.

A cell of a notebook that is run again attaches one to a model that has one. The first would go on
sampling what enters the layers, and nobody could tell whose ranks are whose. What is known here is
no attribute of the model, so that a copy of it is free, and can be saved whole.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary, ref

from torch import nn

from dynlora.adapters.layers import LoraView


@runtime_checkable
class Owner(Protocol):
    """What moves the ranks of layers until it is closed."""

    def close(self) -> None:
        """Let go of the model."""
        ...


_OWNERS: WeakKeyDictionary[nn.Module, dict[str, ref[Owner]]] = WeakKeyDictionary()


def take_over(layers: Sequence[LoraView], owner: Owner) -> int:
    """Close what moves these layers' ranks now, if anything does, and note their new owner.

    Returns:
        How many owners were closed; those that nobody holds any more do not count.
    """
    earlier: dict[int, Owner] = {}
    for layer in layers:
        owners = _OWNERS.setdefault(layer.module, {})
        held = owners[layer.adapter]() if layer.adapter in owners else None
        if held is not None and held is not owner:
            earlier[id(held)] = held
        owners[layer.adapter] = ref(owner)
    for held in earlier.values():
        held.close()
    return len(earlier)


def let_go(layers: Sequence[LoraView], owner: Owner) -> None:
    """Forget an owner that was closed."""
    for layer in layers:
        owners = _OWNERS.get(layer.module, {})
        if layer.adapter in owners and owners[layer.adapter]() is owner:
            del owners[layer.adapter]
