"""Extensions: code that attaches to a model beside the controller, such as input-adaptive ranks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dynlora.adapters.attention import AttentionSink, AttentionTaps
from dynlora.adapters.layers import LoraView


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The model that a controller is attached to, as extensions receive it."""

    model: nn.Module
    """The PEFT model."""
    layers: Sequence[LoraView]
    """The adapter's LoRA layers."""
    timed: Callable[[], AbstractContextManager[None]]
    """Returns a context manager that adds the time in it to `DynamicLora.seconds`."""

    def attention_taps(self, sink: AttentionSink) -> AttentionTaps:
        """Return hooks that pass attention logits to `sink` while they are open.

        Raises:
            ConfigError: If attention cannot be recomputed.
        """
        return AttentionTaps(self.model, self.layers, sink, timed=self.timed)


@runtime_checkable
class Extension(Protocol):
    """Code that runs beside the controller. A metric can be an extension too.

    The controller calls all methods on every process.
    """

    def attach(self, host: Host) -> None:
        """Check the model and install hooks; called again, after `close`, when a run resumes."""
        ...

    def begin_step(self, step: int, *, sampled: bool) -> None:
        """Get ready for the next step.

        Args:
            step: Optimizer steps taken.
            sampled: Whether the forwards of the next step are sampled.
        """
        ...

    def after_event(self, order: Callable[[], None]) -> None:
        """Follow a change of ranks.

        Args:
            order: Sorts the components of each layer by strength, strongest first, without a change
                of outputs.
        """
        ...

    def freeze(self) -> None:
        """Stop observing, because ranks change no more."""
        ...

    def close(self) -> None:
        """Remove every hook."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        ...
