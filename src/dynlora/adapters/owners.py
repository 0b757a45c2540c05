"""Controller of each adapter's ranks: the last one attached.

A notebook cell that runs twice attaches a second controller, while the first would continue to
sample and change ranks. Owners are not attributes of the model, so that its copies have none and
can be saved.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary, ref

from torch import nn

from dynlora.adapters.layers import LoraView


@runtime_checkable
class Owner(Protocol):
    """Controller of layers' ranks until it is closed."""

    def close(self) -> None:
        """Release the model."""
        ...


_OWNERS: WeakKeyDictionary[nn.Module, dict[str, ref[Owner]]] = WeakKeyDictionary()


def take_over(layers: Sequence[LoraView], owner: Owner) -> int:
    """Close the present owners of these layers, and register their new owner.

    Returns:
        Number of closed owners, without garbage-collected ones.
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
    """Remove a closed owner from the registry."""
    for layer in layers:
        owners = _OWNERS.get(layer.module, {})
        if layer.adapter in owners and owners[layer.adapter]() is owner:
            del owners[layer.adapter]
