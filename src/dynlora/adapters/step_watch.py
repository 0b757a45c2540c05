"""Whether the optimizer that was given is the one that takes the steps."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.layers import LoraView
from dynlora.adapters.sharding import is_held
from dynlora.errors import OptimizerError


class StepWatch:
    """Looks at a weight before a step and after it, and whether the optimizer took one between.

    Not in every step: to compare waits for the device.
    """

    def __init__(self, optimizer: Optimizer, layers: Sequence[LoraView]) -> None:
        """Begin without looking.

        Args:
            optimizer: The one that was given.
            layers: The LoRA layers that it trains.
        """
        self._name = type(optimizer).__name__
        self._layers = layers
        self._steps = 0  # since `begin`
        self._before: tuple[LoraView, Tensor] | None = None
        alive = weakref.ref(self)

        def count(*_: Any) -> None:
            watch = alive()
            if watch is not None:
                watch._steps += 1

        self._handle: RemovableHandle = optimizer.register_step_post_hook(count)

    def begin(self) -> None:
        """Look at a weight before the step; none is looked at that an engine holds."""
        self._steps, self._before = 0, None
        for layer in self._layers:
            if layer.is_trained and not is_held(layer.factor_B.parameter):
                self._before = layer, layer.lora_B.detach().clone()
                return

    def end(self) -> None:
        """Check, after the step, that nothing else took it.

        Raises:
            OptimizerError: If the weight has changed, and the optimizer has taken no step.
        """
        before, self._before = self._before, None
        if before is None or self._steps:
            return
        layer, weight = before
        if not torch.equal(layer.lora_B, weight):
            raise OptimizerError(
                f"The {self._name} that `DynamicLora` was given must take the steps, for its state "
                "follows the ranks, got weights that another has changed: take the "
                "`state_dict()`, attach a new `DynamicLora` with that one, and load it there."
            )

    def close(self) -> None:
        """Count no more."""
        self._handle.remove()
