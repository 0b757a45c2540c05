"""Hooks of one controller, which do nothing on copies and pickles of the model."""

from collections.abc import Callable
from typing import Any


class OwnHook:
    """Calls a function on its own model, and does nothing on any copy.

    A pickled function would include the controller and its optimizer. A shared one would pass the
    copy's forwards to the original controller.
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
