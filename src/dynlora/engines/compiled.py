"""`torch.compile`: detect compiled models, allow recompilation, and run steps with hooks eagerly.

In compiled code, hooks would break the graph at every layer, so they do nothing there.
"""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

_RANKS = r".*\['lora_(embedding_)?A'\].*:0,.*\['lora_(embedding_)?B'\].*:1"
"""Axes of size r, in the notation of `torch.compiler.config.dynamic_sources`."""

_COMPILATIONS = 8
"""Compilations of a part after one change of ranks, for training, evaluation and several shapes of
the input: torch's default limit per function in a whole run."""


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


def follow_ranks(model: nn.Module) -> None:
    """Prepare the process's compiler for a change of the ranks of the model's LoRA layers.

    A change recompiles what depends on the ranks, so the compiler's limits rise, beyond which code
    runs eagerly without an error. Blocks compiled one by one share code for all ranks above 1, but
    torch specializes axes of size 1. Such code for a whole model, with hundreds of these axes,
    takes longer to compile than code for fixed ranks.
    """
    compiler, dynamo = torch.compiler.config, torch._dynamo.config
    parts = max(1, _compiled_parts(model))
    if parts > 1 and _RANKS not in compiler.dynamic_sources:
        compiler.dynamic_sources += f",{_RANKS}"
    dynamo.recompile_limit += _COMPILATIONS * parts
    dynamo.accumulated_recompile_limit += _COMPILATIONS * parts


def only_eager(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that does nothing in compiled code."""

    def call(*args: Any) -> None:
        if not torch.compiler.is_compiling():
            function(*args)

    return call


def _compiled_parts(model: nn.Module) -> int:
    return sum(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def is_compiled(model: nn.Module) -> bool:
    """Return whether `torch.compile` compiles a model or a part of it."""
    return _compiled_parts(model) > 0
