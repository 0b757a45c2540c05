"""Whether the optimizer that was given is the one that takes the steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.deepspeed import AnyOptimizer
from dynlora.adapters.layers import LoraView
from dynlora.adapters.sharding import is_held
from dynlora.errors import OptimizerError


class StepWatch:
    """Looks at a weight before a step and after it, and whether the optimizer took one between.

    Not in every step: to compare waits for the device.
    """

    def __init__(self, optimizer: AnyOptimizer, layers: Sequence[LoraView]) -> None:
        """Begin without looking.

        Args:
            optimizer: The one that was given; DeepSpeed's is not watched.
            layers: The LoRA layers that it trains.
        """
        self._optimizer = optimizer
        self._layers = layers
        self._stepped = False
        self._before: tuple[LoraView, Tensor] | None = None
        self._handle: RemovableHandle | None = None

    def begin(self) -> None:
        """Look at a weight before the step; none is looked at that an engine holds."""
        self._forget()
        if not isinstance(self._optimizer, Optimizer):
            return
        for layer in self._layers:
            if layer.is_trained and not is_held(layer.factor_B.parameter):
                self._before = layer, layer.lora_B.detach().clone()
                self._handle = self._optimizer.register_step_post_hook(self._note)
                return

    def end(self) -> None:
        """Check, after the step, that nothing else took it; nothing without a `begin`.

        Raises:
            OptimizerError: If the weight has changed, and the optimizer has taken no step.
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
