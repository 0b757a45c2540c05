"""One controller per adapter: the last one attached, whose hooks do nothing on copies."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from dynlora.adapters.layers import LoraView


class OwnHook:
    """Calls a function on its own model, and does nothing on any copy.

    A copy would otherwise include the controller, or pass its forwards to the original one.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)

    def __reduce__(self) -> tuple[type["OwnHook"], tuple[Callable[..., None]]]:
        """Make copies that do nothing."""
        return OwnHook, (_nothing,)


def _nothing(*_: Any) -> None:
    pass


_OWNERS: WeakKeyDictionary[nn.Module, dict[str, ref[Any]]] = WeakKeyDictionary()
"""The last controller attached to each adapter. Not an attribute of the model, so that its copies
have none and can be saved."""


def take_over(layers: Sequence[LoraView], owner: Any) -> int:
    """Register the owner of these layers, and close present ones; return their number.

    After a notebook cell has run twice, the first controller would continue to change ranks.
    """
    earlier: dict[int, Any] = {}
    for layer in layers:
        owners = _OWNERS.setdefault(layer.module, {})
        held = owners[layer.adapter]() if layer.adapter in owners else None
        if held is not None and held is not owner:
            earlier[id(held)] = held
        owners[layer.adapter] = ref(owner)
    for held in earlier.values():
        held.close()
    return len(earlier)


def let_go(layers: Sequence[LoraView], owner: Any) -> None:
    """Remove a closed owner from the registry."""
    for layer in layers:
        owners = _OWNERS.get(layer.module, {})
        if layer.adapter in owners and owners[layer.adapter]() is owner:
            del owners[layer.adapter]
