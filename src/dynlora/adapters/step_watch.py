"""Check that the given optimizer takes the steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.layers import LoraView
from dynlora.engines.deepspeed import AnyOptimizer
from dynlora.engines.sharding import is_held
from dynlora.errors import OptimizerError


class StepWatch:
    """Compares a weight before and after a step, to detect steps of another optimizer.

    Not in every step, because the comparison synchronizes with the device.
    """

    def __init__(self, optimizer: AnyOptimizer, layers: Sequence[LoraView]) -> None:
        """Start without a comparison.

        Args:
            optimizer: The optimizer to check; DeepSpeed's is not checked.
            layers: The LoRA layers that it trains.
        """
        self._optimizer = optimizer
        self._layers = layers
        self._stepped = False
        self._before: tuple[LoraView, Tensor] | None = None
        self._handle: RemovableHandle | None = None

    def begin(self) -> None:
        """Copy the first trained weight that no engine manages, before the step."""
        self._forget()
        if not isinstance(self._optimizer, Optimizer):
            return
        for layer in self._layers:
            if layer.is_trained and not is_held(layer.factor_B.parameter):
                self._before = layer, layer.lora_B.detach().clone()
                self._handle = self._optimizer.register_step_post_hook(self._note)
                return

    def end(self) -> None:
        """Check after the step that no other optimizer took it; do nothing without `begin`.

        Raises:
            OptimizerError: If the weight changed without a step of the optimizer.
        """
        before, stepped = self._before, self._stepped
        self._forget()
        if before is None or stepped:
            return
        layer, weight = before
        if not torch.equal(layer.lora_B, weight):
            raise OptimizerError(
                f"The {type(self._optimizer).__name__} that `DynamicLora` was given must take the "
                "steps, for its state follows the ranks, got weights that another has changed: "
                "take the `state_dict()`, attach a new `DynamicLora` with that one, and load it "
                "there."
            )

    def _note(self, *_: Any) -> None:
        self._stepped = True

    def _forget(self) -> None:
        self._stepped, self._before = False, None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
