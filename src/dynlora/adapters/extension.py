"""Extensions: code that attaches to a model beside the controller, such as input-adaptive ranks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dynlora.adapters.attention import AttentionSink, AttentionTaps
from dynlora.adapters.layers import LoraView
from dynlora.config import EXTENSIONS, DynamicLoraConfig, load, path_of
from dynlora.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Model, layers and timer of a controller, for its extensions."""

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

    def begin_step(self, step: int, *, sampled: bool) -> None:
        """Prepare for the step after `step` optimizer steps, whose forwards may be `sampled`."""

    def after_event(self, order: Callable[[], None]) -> None:
        """Follow a change of ranks.

        `order()` sorts the components of each layer, strongest first, without a change of outputs.
        """

    def freeze(self) -> None:
        """Stop observing, because ranks change no more."""

    def close(self) -> None:
        """Remove every hook."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""


class Extensions:
    """All extensions of one controller, called together."""

    def __init__(
        self, config: DynamicLoraConfig, given: Sequence[Extension], metric: object, host: Host
    ) -> None:
        """Collect extensions, and the metric if it is one, whose state the assessor saves."""
        self._attached = ExitStack()
        self._host = host
        self.by_name: dict[str, Extension] = {}
        """Extensions with state, by setting or import path."""
        for extension in given:
            path = path_of(extension)  # the key of its state
            if path in self.by_name:
                raise ConfigError(
                    f"`extensions` must be of different classes, but got two of {path}: merge them."
                )
            self.by_name[path] = extension
        on = [setting for setting in EXTENSIONS if getattr(config, setting)]
        own = {setting: load(EXTENSIONS[setting]).of_controller(host) for setting in on}
        self.by_name = own | self.by_name
        self._all = list(self.by_name.values())
        if isinstance(metric, Extension):
            self._all.append(metric)

    def attach(self) -> None:
        """Attach all, or none if one refuses; attached ones are closed first."""
        self.close()
        with ExitStack() as undo:
            for extension in self._all:
                extension.attach(self._host)
                undo.callback(extension.close)
            self._attached = undo.pop_all()

    def remove_others(self, layers: Sequence[LoraView]) -> list[str]:
        """Remove hooks of earlier runs' extensions without a setting now; return their settings."""
        off = EXTENSIONS.keys() - self.by_name.keys()
        return [setting for setting in sorted(off) if load(EXTENSIONS[setting]).remove(layers)]

    def begin_step(self, step: int, *, sampled: bool) -> None:
        """Begin a step in all extensions."""
        for extension in self._all:
            extension.begin_step(step, sampled=sampled)

    def after_event(self, order: Callable[[], None]) -> None:
        """Let all extensions follow a change of ranks."""
        for extension in self._all:
            extension.after_event(order)

    def freeze(self) -> None:
        """Freeze all extensions."""
        for extension in self._all:
            extension.freeze()

    def close(self) -> None:
        """Close all attached extensions."""
        self._attached.close()

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of all states as tensors keyed ``<name>/<key>``."""
        return {
            f"{name}/{key}": value.detach().clone()
            for name, extension in self.by_name.items()
            for key, value in extension.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        for name, extension in self.by_name.items():
            own = f"{name}/"
            extension.load_state_dict(
                {key.removeprefix(own): v for key, v in state.items() if key.startswith(own)}
            )

    def saved_names(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return the names of a saved run's extensions; those without state are taken as equal."""
        names = {key.split("/")[0] for key in state}
        return sorted(names.union(n for n, e in self.by_name.items() if not e.state_dict()))
