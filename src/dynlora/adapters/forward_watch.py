"""All hooks that observe forwards, installed only in sampled steps."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import nn

from dynlora.adapters.hooks import ActivationSink, ActivationTaps
from dynlora.adapters.layers import LoraView
from dynlora.engines.compiled import EagerSteps


class ForwardWatch:
    """Passes activations to the analyzer."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LoraView],
        sink: ActivationSink,
        *,
        may_be_compiled: bool,
        timed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Prepare the hooks; `open` installs them.

        Args:
            model: Model called with each batch.
            layers: The LoRA layers to observe.
            sink: Receiver of the activations.
            may_be_compiled: Whether sampled steps must bypass compiled code.
            timed: Context manager that measures the time spent in it.
        """
        self._taps = ActivationTaps(model, layers, sink, timed=timed)
        self._parts: tuple[ActivationTaps | EagerSteps, ...] = (
            (self._taps, EagerSteps()) if may_be_compiled else (self._taps,)
        )

    def open(self, step: int) -> None:
        """Observe forwards from now on.

        Args:
            step: Number of optimizer steps taken.
        """
        self._taps.step = step
        for part in self._parts:
            part.open()

    def close(self) -> None:
        """Remove every hook."""
        for part in self._parts:
            part.close()
