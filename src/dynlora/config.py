"""`DynamicLoraConfig`: every choice a user has about how ranks move, with its range.

The configuration stops at the controller, which unpacks it; the stages take plain arguments.
"""

import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import import_module
from inspect import signature
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from dynlora.errors import ConfigError

METRICS: Mapping[str, str] = {
    "signal": "dynlora.importance.signal:SignalMetric",
    "sensitivity": "dynlora.importance.sensitivity:SensitivityMetric",
    "gradient_norm": "dynlora.importance.gradient_norm:GradientNormMetric",
    "fisher": "dynlora.importance.fisher:FisherMetric",
    "spectral": "dynlora.importance.spectral:SpectralMetric",
    "activation_ratio": "dynlora.importance.activation_ratio:ActivationRatioMetric",
    "magnitude": "dynlora.importance.magnitude:MagnitudeMetric",
    "attention_entropy": "dynlora.importance.attention_entropy:AttentionEntropyMetric",
    "uniform": "dynlora.importance.uniform:UniformMetric",
    "random": "dynlora.importance.random:RandomMetric",
}
"""Importance metrics by name: the import path of each class."""

EXTENSIONS: Mapping[str, str] = {
    "input_adaptive": "dynlora.input_adaptive.extension:InputAdaptiveExtension",
}
"""Settings that switch an extension on: the import path of each class."""

if TYPE_CHECKING:
    from dynlora.importance.protocol import ImportanceMetric

    Importance = str | ImportanceMetric
else:  # files and the command line can only give names
    Importance = Literal[*METRICS]

FeatureName = Literal["effective_rank", "variance"]

ModeName = Literal["auto", "physical", "static"]

NonFiniteReaction = Literal["skip", "stop"]

PresetName = Literal["default", "paper"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    # As the paper describes it: shares are the normalised gradients of the layers times the
    # variance of their inputs, and ranks follow in real time, over the whole run.
    "paper": {
        "importance": "gradient_norm",
        "temperature": 1.0,
        "uniform_mix": 0.0,
        "feature": "variance",
        "feature_weight": 1.0,
        "layer_weights": True,
        "last_event": 0.95,
        "events": 19,
    },
}
"""Values by preset; what it does not name has its default."""

_REAL = (
    "temperature", "uniform_mix", "feature_weight", "first_event", "last_event", "hysteresis",
    "shrink_tolerance",
)  # fmt: skip

_LIMITS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("above 0", lambda value: value > 0),
    "uniform_mix": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "feature_weight": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "min_rank": ("at least 1", lambda value: value >= 1),
    "total_steps": ("at least 1", lambda value: value is None or value >= 1),
    "first_event": ("in (0, 1]", lambda value: 0 < value <= 1),
    "events": ("at least 1", lambda value: value >= 1),
    "hysteresis": ("at least 0, finite", lambda value: 0 <= value < math.inf),
    "shrink_tolerance": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "seed": ("between -2^63 and 2^63", lambda value: abs(value) < 2**63),
}
"""Limits by setting: in words, and as a test."""

PRESET_TEXT = "Which values the keys of this section have that are not given."
"""What the key of that name means in a file; in Python see `DynamicLoraConfig.from_preset`."""


MOST_TIMES_R = 8
"""Default `max_rank` as a multiple of `LoraConfig.r`; bounds one layer's part of the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicLoraConfig:
    """How the budget moves between LoRA layers while the model trains.

    The budget itself is PEFT's: the parameters that `LoraConfig.r` takes on every targeted layer.
    """

    importance: Importance = "signal"
    """Metric that scores the layers; `uniform` leaves all ranks as they are. In Python also an
    object that follows `ImportanceMetric`, of which each run uses a copy."""
    temperature: float = 0.5
    """Shares follow score ** (1 / temperature): below 1 sharpens, above 1 flattens. Above 0."""
    uniform_mix: float = 0.2
    """Part of the budget that is spread evenly whatever the scores say, in [0, 1]."""
    feature: FeatureName = "effective_rank"
    """What is looked at in a layer's input: its `effective_rank`, or its `variance`."""
    feature_weight: float = 0.0
    """Power of the input's `feature`, relative to the layers' mean, that multiplies a layer's
    score, in [0, 1]."""
    layer_weights: bool = False
    """Let important layers learn faster: scale each adapter's step by its importance, in
    [1/2, 2], without changing what the model computes. With SGD, whose steps grow with gradients,
    by its square."""
    input_adaptive: bool = False
    """Let each example use only as many of a layer's components, the strongest first, as its own
    complexity asks for: a quarter, half, three quarters or all of them."""
    min_rank: int = 1
    """Lowest rank of any layer, at least 1."""
    max_rank: int | None = None
    """Highest rank of any layer; None takes eight times `LoraConfig.r`, or a higher one that a
    layer comes with. Layers whose gradients point in few directions get less of it."""
    pinned: tuple[str, ...] = ()
    """Glob patterns (as in `fnmatch`) of module names whose rank must not move."""
    total_steps: int | None = None
    """Optimizer steps of the whole run; None if unknown (the Trainer callback fills it in)."""
    first_event: float = 0.05
    """When ranks first move, as a fraction of `total_steps`, in (0, 1]."""
    last_event: float = 0.3
    """When ranks last move, as a fraction of `total_steps`; then they hold. In [first_event, 1]."""
    events: int = 5
    """Number of times ranks may move, at least 1. With unknown length they come at steps
    20, 40, 80, ... and then ranks hold."""
    hysteresis: float = 0.25
    """A rank moves only if it is worth this much more elsewhere, relative; at least 0."""
    shrink_tolerance: float = 0.05
    """Most that a shrink may take from a layer's output, as the norm of the part dropped relative
    to the norm of the layer's whole output on observed tokens; what exceeds it waits. In [0, 1]."""
    fused: bool = True
    """Compute layers and adapters together (see `FusedLora`): faster, and the same up to rounding;
    false leaves PEFT's own forwards, which are the same to the last bit."""
    mode: ModeName = "auto"
    """How tensors are held: `physical` gives them the live rank; `static` one rank for good, the
    highest that a layer may come to, as several processes need; `auto` chooses."""
    on_nonfinite: NonFiniteReaction = "skip"
    """What a NaN or infinite gradient does: skip that observation and count it, or stop; to stop
    in time, every step waits for its gradients."""
    seed: int = 0
    """Seed of the random metric and of directions no input has shown yet."""

    @classmethod
    def from_preset(cls, preset: PresetName, **values: Any) -> "DynamicLoraConfig":
        """Return the configuration of a preset, with these values in place of its own.

        Example:
            >>> DynamicLoraConfig.from_preset("paper", events=8)

        Raises:
            ConfigError: If there is no such preset, or a value is outside its range.
        """
        return cls(**{**preset_values(preset), **values})

    def highest_rank(self, configured: int, held: Iterable[int]) -> int:
        """Return `max_rank`, or its default from `LoraConfig.r` and the live ranks."""
        return self.max_rank or max(MOST_TIMES_R * configured, *held)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; a metric object becomes its import path and settings."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not isinstance(self.importance, str):
            values["importance"] = _described(self.importance)
        return values

    def __post_init__(self) -> None:
        """Check each value, then how they fit together.

        Raises:
            ConfigError: If a value is outside its range.
        """
        for name in ("min_rank", "max_rank", "total_steps", "events", "seed"):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value is not None or default is not None:
                object.__setattr__(self, name, _whole(name, value))
        for name in _REAL:
            object.__setattr__(self, name, _real(name, getattr(self, name)))
        if isinstance(self.importance, str):
            _require_one_of(tuple(METRICS), "importance", self.importance)
        else:
            protocol = load("dynlora.importance.protocol:ImportanceMetric")
            follows = isinstance(self.importance, protocol)
            _require(
                follows and not isinstance(self.importance, type),
                "importance",
                "a name or an object that follows `ImportanceMetric`",
                self.importance,
            )
        _require_one_of(get_args(FeatureName), "feature", self.feature)
        _require_one_of(get_args(ModeName), "mode", self.mode)
        _require_one_of(get_args(NonFiniteReaction), "on_nonfinite", self.on_nonfinite)
        for name, (required, holds) in _LIMITS.items():
            _require(holds(getattr(self, name)), name, required, getattr(self, name))
        _require(
            self.max_rank is None or self.max_rank >= self.min_rank,
            "max_rank",
            f"at least min_rank={self.min_rank}",
            self.max_rank,
        )
        _require(
            self.first_event <= self.last_event <= 1,
            "last_event",
            f"in [first_event={self.first_event}, 1]",
            self.last_event,
        )
        _require(
            not isinstance(self.pinned, str),
            "pinned",
            "a tuple of patterns",
            f"the text {self.pinned!r}",  # each of its letters would be a pattern
        )
        ordered = sorted(self.pinned) if isinstance(self.pinned, Set) else self.pinned
        object.__setattr__(self, "pinned", tuple(ordered))


def load(path: str) -> Any:
    """Import an object from its path, such as ``module:Class``."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def path_of(given: object) -> str:
    """Return the import path of an object's class."""
    return f"{type(given).__module__}:{type(given).__qualname__}"


def _described(given: object) -> dict[str, Any]:
    """Return an object's import path, and the constructor arguments that it keeps by their names.

    Arguments without a JSON value are left out.
    """
    settings = {}
    for name in signature(type(given)).parameters:
        if name in dir(given):
            value = getattr(given, name)
            with suppress(TypeError, ValueError):
                settings[name] = json.loads(json.dumps(value))
    return {"path": path_of(given), "settings": settings}


def preset_values(preset: str) -> Mapping[str, Any]:
    """Return the values of a preset that differ from the defaults.

    Raises:
        ConfigError: If there is no such preset.
    """
    _require_one_of(tuple(PRESETS), "preset", preset)
    return PRESETS[preset]


def _whole(name: str, given: Any) -> int:
    """Return a whole number as Python's own, whose like of numpy no JSON can hold."""
    try:
        return operator.index(given)
    except TypeError:
        raise ConfigError(f"`{name}` must be a whole number, got {given!r}.") from None


def _real(name: str, given: Any) -> int | float:
    """Return a number as Python's own."""
    if not isinstance(given, Real):
        raise ConfigError(f"`{name}` must be a number, got {given!r}.")
    return given if isinstance(given, int) else float(given)


def _require(holds: bool, name: str, required: str, given: object) -> None:
    if not holds:
        raise ConfigError(f"`{name}` must be {required}, got {given}.")


def _require_one_of(allowed: tuple[str, ...], name: str, given: str) -> None:
    _require(given in allowed, name, f"one of {', '.join(allowed)}", given)
