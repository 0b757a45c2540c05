"""All hooks that observe forwards, installed only in sampled steps."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import nn

from dynlora.adapters.attention import AttentionSink, AttentionTaps
from dynlora.adapters.hooks import ActivationSink, ActivationTaps
from dynlora.adapters.layers import LoraView
from dynlora.engines.compiled import EagerSteps


class ForwardWatch:
    """Passes activations to the analyzer, and attention to metrics that need it."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LoraView],
        sink: ActivationSink,
        metric: object,
        *,
        may_be_compiled: bool,
        timed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Prepare the hooks; `open` installs them.

        Args:
            model: Model called with each batch.
            layers: The LoRA layers to observe.
            sink: Receiver of the activations.
            metric: Receives attention if it is an `AttentionSink`.
            may_be_compiled: Whether sampled steps must bypass compiled code.
            timed: Context manager that measures the time spent in it.

        Raises:
            ConfigError: If the metric needs attention that cannot be recomputed.
        """
        self._taps = ActivationTaps(model, layers, sink, timed=timed)
        self._others: list[AttentionTaps | EagerSteps] = []
        if isinstance(metric, AttentionSink):
            self._others.append(AttentionTaps(model, layers, metric, timed=timed))
        if may_be_compiled:
            self._others.append(EagerSteps())

    def open(self, step: int) -> None:
        """Observe forwards from now on.

        Args:
            step: Number of optimizer steps taken.
        """
        self._taps.step = step
        for part in (self._taps, *self._others):
            part.open()

    def close(self) -> None:
        """Remove every hook."""
        for part in (self._taps, *self._others):
            part.close()
