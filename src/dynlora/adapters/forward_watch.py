"""All hooks that look at forwards: there in the steps that are sampled, gone in all others."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import nn

from dynlora.adapters.attention_taps import AttentionSink, AttentionTaps
from dynlora.adapters.eager import EagerSteps
from dynlora.adapters.layers import LoraView
from dynlora.adapters.taps import ActivationSink, ActivationTaps


class ForwardWatch:
    """Shows activations to the analyzer, and attention to a metric that asks for it."""

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
        """Find what to hook; nothing is installed yet.

        Args:
            model: What is called with a batch.
            layers: The LoRA layers to show.
            sink: Takes the activations.
            metric: Takes attention, if it is an `AttentionSink`.
            may_be_compiled: Whether the steps that are shown must be kept from compiled code.
            timed: Context manager that books the time spent in it.

        Raises:
            ConfigError: If the metric asks for attention and none can be reached.
        """
        self._taps = ActivationTaps(model, layers, sink, timed=timed)
        self._others: list[AttentionTaps | EagerSteps] = []
        if isinstance(metric, AttentionSink):
            self._others.append(AttentionTaps(model, layers, metric, timed=timed))
        if may_be_compiled:
            self._others.append(EagerSteps())

    def open(self, step: int) -> None:
        """Show the forwards from here on.

        Args:
            step: Optimizer steps taken.
        """
        self._taps.step = step
        for part in (self._taps, *self._others):
            part.open()

    def close(self) -> None:
        """Remove every hook."""
        for part in (self._taps, *self._others):
            part.close()
