"""Steps whose forwards run as written, though the model was compiled.

Hooks that look at activations would be compiled into the model, or break its graph at every layer,
and each change of what they do would compile it anew. The few steps that have hooks are left to
Python; all others find the model without any, as it was compiled.
"""

import weakref
from typing import Any, ClassVar

import torch


class EagerSteps:
    """Turns compiled code off, and on again once nobody needs it off."""

    _stance: ClassVar[Any] = None
    """What brings back the setting of the whole process that was there before."""
    _users: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        # A run that ends in an error must not leave the process without its compiler.
        weakref.finalize(self, EagerSteps._leave, id(self))

    def open(self) -> None:
        """Leave forwards to Python from here on."""
        if EagerSteps._stance is None:
            EagerSteps._stance = torch.compiler.set_stance("force_eager")
        EagerSteps._users.add(id(self))

    def close(self) -> None:
        """Let compiled code run again, unless another still needs it off."""
        EagerSteps._leave(id(self))

    @staticmethod
    def _leave(user: int) -> None:
        EagerSteps._users.discard(user)
        if not EagerSteps._users and EagerSteps._stance is not None:
            EagerSteps._stance.__exit__(None, None, None)
            EagerSteps._stance = None
