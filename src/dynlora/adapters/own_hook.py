"""Hooks that belong to one controller: a copy or a pickle of the model goes on without them."""

from collections.abc import Callable
from typing import Any


class OwnHook:
    """Calls a function on the model that it was put on, and does nothing on any copy of it.

    Pickled with the model, the function would drag a controller along, and an optimizer; shared by
    a copy, it would show the copy's forwards to the original's controller.
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
