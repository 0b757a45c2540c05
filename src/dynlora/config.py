"""`DynamicLoraConfig`: all settings of how ranks move, with their ranges."""

import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import import_module
from inspect import signature
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

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
    "uniform": "dynlora.importance.controls:UniformMetric",
    "random": "dynlora.importance.controls:RandomMetric",
}
"""Importance metrics by name: the import path of each class."""

EXTENSIONS: Mapping[str, str] = {
    "input_adaptive": "dynlora.input_adaptive.ranks:InputAdaptiveRanks",
}
"""Settings that switch an extension on: the import path of each class."""

if TYPE_CHECKING:
    from dynlora.importance import ImportanceMetric

    Importance: TypeAlias = "str | ImportanceMetric"
else:  # files and the command line can only give names
    Importance = Literal[*METRICS]

FeatureName = Literal["effective_rank", "variance"]


NonFiniteReaction = Literal["skip", "stop"]

PresetName = Literal["default", "paper"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    # As in the paper: shares are normalized gradients times input variances, and ranks follow over
    # the whole run.
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
"""Values by preset; all other settings have their defaults."""

PRESET_TEXT = "Values of the keys of this section that are not set."
"""Description of the key `preset` in a file; in Python use `DynamicLoraConfig.from_preset`."""

MOST_TIMES_R = 8
"""Default `max_rank` as a multiple of `LoraConfig.r`; bounds one layer's part of the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicLoraConfig:
    """How the budget moves between LoRA layers during training.

    The budget is the number of parameters at rank `LoraConfig.r` on every targeted layer.
    """

    importance: Importance = "signal"
    """Metric that scores the layers; `uniform` moves no rank, but spends what a continued adapter
    leaves of the budget. In Python also an object that follows `ImportanceMetric`, of which each
    run uses a copy."""
    temperature: float = 0.5
    """Shares follow score ** (1 / temperature): below 1 sharpens, above 1 flattens. Above 0."""
    uniform_mix: float = 0.2
    """Part of the budget that is spread evenly, regardless of the scores, in [0, 1]."""
    feature: FeatureName = "effective_rank"
    """Statistic of a layer's input: `effective_rank` or `variance`."""
    feature_weight: float = 0.0
    """Exponent of the input's `feature`, relative to the mean over layers, which multiplies the
    layer's score, in [0, 1]."""
    layer_weights: bool = False
    """Let important layers learn faster: scale each adapter's step by its relative importance, in
    [1/2, 2], without a change of outputs. With SGD the factor is squared."""
    input_adaptive: bool = False
    """Let each example use a quarter, half, three quarters or all of a layer's components, the
    strongest first, depending on its complexity."""
    min_rank: int = 1
    """Lowest rank of any layer, at least 1."""
    max_rank: int | None = None
    """Highest rank of any layer; None for eight times `LoraConfig.r` times `budget_end`, or for
    `LoraConfig.r` or a present rank above that. Layers whose gradients have few directions have a
    lower limit."""
    budget_end: float | Literal["auto"] | None = None
    """Part of the initial budget that is left after the last event, in (0, 1]; None for all of it.
    Each event lowers the budget by the same factor, and first drops the weakest directions of all
    layers, even where that exceeds `shrink_tolerance`. `auto` lowers it after 90 % of the run
    to the smallest budget that keeps the validation loss. Needs `total_steps`."""
    budget_tolerance: float = 0.01
    """With `budget_end="auto"`, largest rise of the validation loss by the cut, as a part of its
    reduction since the start of the run, in [0, 1]."""
    pinned: tuple[str, ...] = ()
    """Glob patterns (as in `fnmatch`) of module names whose rank stays fixed."""
    total_steps: int | None = None
    """Optimizer steps of the whole run; None if unknown (the Trainer callback sets it)."""
    first_event: float = 0.05
    """First event, as a fraction of `total_steps`, in (0, 1]."""
    last_event: float = 0.3
    """Last planned event, as a fraction of `total_steps`, in [first_event, 1]. If gradients agree
    too late for three events with scores, more follow, up to 60 % of the run."""
    events: int = 5
    """Number of events, at which ranks may move, at least 1. With an unknown run length they are at
    steps 20, 40, 80, ..."""
    hysteresis: float = 0.25
    """Relative gain above which a rank moves to another layer, at least 0."""
    shrink_tolerance: float = 0.05
    """Largest norm of the output that a shrink may drop, relative to the norm of the layer's output
    on observed tokens, in [0, 1]; a larger shrink is postponed."""
    fused: bool = True
    """Compute each layer and its adapter together (see `FusedLora`): faster, and equal up to
    rounding. False keeps PEFT's forwards, bit for bit."""
    on_nonfinite: NonFiniteReaction = "skip"
    """Reaction to a NaN or infinite gradient up to the last event: `skip` ignores and counts it,
    `stop` ends the run. With `stop`, every such step waits for its gradients."""
    seed: int = 0
    """Seed of the `random` metric, and of new directions without an observed input."""

    @classmethod
    def from_preset(cls, preset: PresetName, **values: Any) -> "DynamicLoraConfig":
        """Return the configuration of a preset, with these values instead of the preset's.

        Examples:
            >>> DynamicLoraConfig.from_preset("paper", events=8)

        Raises:
            ConfigError: If there is no such preset, or a value is outside its range.
        """
        return cls(**{**preset_values(preset), **values})

    def highest_rank(self, configured: int, held: Iterable[int]) -> int:
        """Return `max_rank`, or its default from `LoraConfig.r` and the present ranks."""
        at_end = self.budget_left(MOST_TIMES_R * configured)
        return self.max_rank or max(at_end, configured, *held)

    def budget_left(self, budget: int, *, passed: float = 1.0) -> int:
        """Return the budget after a part of the events has `passed`, of `budget` at the start."""
        end = 1.0 if self.budget_end in (None, "auto") else float(self.budget_end)
        left: float = end**passed
        return round(budget * left)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; a metric object becomes its import path and settings."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not isinstance(self.importance, str):
            values["importance"] = _described(self.importance)
        return values

    def __post_init__(self) -> None:
        """Raise `ConfigError` if a value, or a combination, is outside its range."""
        for name, (convert, required, holds) in _CONVERTED.items():
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value is not None or default is not None:
                value = convert(name, value)
                object.__setattr__(self, name, value)
                _require(holds(value, self), name, required.format(self), value)
        if isinstance(self.importance, str):
            _require_one_of(tuple(METRICS), "importance", self.importance)
        else:
            protocol = load("dynlora.importance:ImportanceMetric")
            follows = isinstance(self.importance, protocol)
            _require(
                follows and not isinstance(self.importance, type),
                "importance",
                "a name or an object that follows `ImportanceMetric`",
                self.importance,
            )
        _require_one_of(get_args(FeatureName), "feature", self.feature)
        _require_one_of(get_args(NonFiniteReaction), "on_nonfinite", self.on_nonfinite)
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
    """Return an object's import path, and constructor arguments that it keeps as JSON values."""
    settings = {}
    for name in signature(type(given)).parameters:
        if name in dir(given):
            value = getattr(given, name)
            with suppress(TypeError, ValueError):
                settings[name] = json.loads(json.dumps(value))
    return {"path": path_of(given), "settings": settings}


def preset_values(preset: str) -> Mapping[str, Any]:
    """Return the values of a preset that differ from the defaults."""
    _require_one_of(tuple(PRESETS), "preset", preset)
    return PRESETS[preset]


def _whole(name: str, given: Any) -> int:
    """Convert an integer, such as numpy's, to `int`, because JSON has no other."""
    try:
        return operator.index(given)
    except TypeError:
        raise ConfigError(f"`{name}` must be a whole number, got {given!r}.") from None


def _flag(name: str, given: Any) -> bool:
    if given not in (True, False):
        raise ConfigError(f"`{name}` must be true or false, got {given!r}.")
    return bool(given)


def _real(name: str, given: Any) -> int | float:
    if not isinstance(given, Real) or isinstance(given, bool):
        raise ConfigError(f"`{name}` must be a number, got {given!r}.")
    return given if isinstance(given, int) else float(given)


def _real_or_auto(name: str, given: Any) -> Any:
    return given if given == "auto" else _real(name, given)


_CONVERTED: Mapping[str, tuple[Callable[[str, Any], Any], str, Callable[[Any, Any], bool]]] = {
    "temperature": (_real, "above 0", lambda value, _: value > 0),
    "uniform_mix": (_real, "in [0, 1]", lambda value, _: 0 <= value <= 1),
    "feature_weight": (_real, "in [0, 1]", lambda value, _: 0 <= value <= 1),
    **dict.fromkeys(("layer_weights", "input_adaptive", "fused"), (_flag, "", lambda *_: True)),
    "min_rank": (_whole, "at least 1", lambda value, _: value >= 1),
    "max_rank": (_whole, "at least min_rank={0.min_rank}", lambda value, of: value >= of.min_rank),
    "budget_end": (_real_or_auto, "in (0, 1], or auto", lambda x, _: x == "auto" or 0 < x <= 1),
    "budget_tolerance": (_real, "in [0, 1]", lambda value, _: 0 <= value <= 1),
    "total_steps": (_whole, "at least 1", lambda value, _: value >= 1),
    "first_event": (_real, "in (0, 1]", lambda value, _: 0 < value <= 1),
    "last_event": (
        _real,
        "in [first_event={0.first_event}, 1]",
        lambda value, of: of.first_event <= value <= 1,
    ),
    "events": (_whole, "at least 1", lambda value, _: value >= 1),
    "hysteresis": (_real, "at least 0, finite", lambda value, _: 0 <= value < math.inf),
    "shrink_tolerance": (_real, "in [0, 1]", lambda value, _: 0 <= value <= 1),
    "seed": (_whole, "between -2^63 and 2^63", lambda value, _: abs(value) < 2**63),
}
"""Per setting a conversion, its limits in words with other settings, and a test of both."""


def _require(holds: bool, name: str, required: str, given: object) -> None:
    if not holds:
        raise ConfigError(f"`{name}` must be {required}, got {given}.")


def _require_one_of(allowed: tuple[str, ...], name: str, given: str) -> None:
    _require(given in allowed, name, f"one of {', '.join(allowed)}", given)
