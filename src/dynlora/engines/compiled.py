"""`torch.compile`: detect compiled models, and run the few steps with hooks eagerly.

Otherwise it would break its graph at every layer, and recompile whenever hooks change.
"""

import weakref
from typing import Any, ClassVar

import torch
from torch import nn

from dynlora.errors import EngineError


class EagerSteps:
    """Disables compiled code until its last user closes."""

    _stance: ClassVar[Any] = None
    """Context that restores the previous setting of the process."""
    _users: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        # A failed run must not leave the process without compiled code.
        weakref.finalize(self, EagerSteps._leave, id(self))

    def open(self) -> None:
        """Run forwards eagerly from now on."""
        if EagerSteps._stance is None:
            EagerSteps._stance = torch.compiler.set_stance("force_eager")
        EagerSteps._users.add(id(self))

    def close(self) -> None:
        """Run compiled code again, unless another user needs eager forwards."""
        EagerSteps._leave(id(self))

    @staticmethod
    def _leave(user: int) -> None:
        EagerSteps._users.discard(user)
        if not EagerSteps._users and EagerSteps._stance is not None:
            EagerSteps._stance.__exit__(None, None, None)
            EagerSteps._stance = None


def is_compiled(model: nn.Module) -> bool:
    """Return whether `torch.compile` compiles a model or a part of it."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def check_not_compiled(model: nn.Module) -> None:
    """Raise `EngineError` if a model is compiled."""
    if is_compiled(model):
        raise EngineError(
            f"The model must run without torch.compile, got a compiled {type(model).__name__}: "
            "pass the bare model, and do not compile it."
        )
