"""Schedule: run length and settings in; event steps and observed steps out, in optimizer steps.

With a known length, events are evenly spaced early in training (the literature uses about 15 % to
50 %). Otherwise intervals double, so that 300 and 300,000 steps both get a few early events.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynlora.config import DynamicLoraConfig
from dynlora.errors import ConfigError

FIRST_STEP_OF_UNKNOWN_LENGTH = 20
"""First event of a run of unknown length."""

MOST_DOUBLINGS = 20
"""Most events in a run of unknown length."""

OBSERVATIONS = 64
"""Fewest observed steps per event, if there are as many steps: twice the memory of the running mean
of gradients."""

SCORED_EVENTS = 3
"""Events with scores that a run has before its ranks are fixed, if gradients agree in time."""

LATEST = 0.6
"""Latest event, as a part of the run."""

SEARCH = 0.9
"""Search for the smallest sufficient budget, as a part of the run. Steps after it cannot use the
ranks that were cut."""

BLOCK = 8
"""Consecutive steps that are observed together, of which the first has sampled forwards. At working
learning rates only gradients of adjacent steps agree."""

MOST_APART = 8
"""Largest number of blocks of which one is observed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timetable:
    """The steps of one run after which ranks may change, counted from 1."""

    events: tuple[int, ...]
    late_events: tuple[int, ...]
    """Further events of a run with fewer scored ones than `enough`."""
    search: int | None
    """Search for the smallest sufficient budget."""
    enough: int

    @classmethod
    def of(cls, config: DynamicLoraConfig) -> "Timetable":
        """Return the timetable of a new run.

        Raises:
            ConfigError: If a falling budget meets an unknown run length.
        """
        return cls(
            events=event_steps(config),
            late_events=late_event_steps(config),
            search=search_step(config),
            enough=min(SCORED_EVENTS, config.events),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Timetable":
        """Return the timetable of `dataclasses.asdict`, also after a passage through JSON."""
        steps = {name: tuple(values[name]) for name in ("events", "late_events")}
        return cls(**steps, search=values["search"], enough=values["enough"])

    @property
    def changes(self) -> list[int]:
        """All steps after which ranks may change, in their order."""
        steps = {*self.events, *self.late_events, self.search}
        return sorted(step for step in steps if step is not None)

    def events_are_over(self, step: int, scored: int) -> bool:
        """Return whether the last event has passed, after `scored` events with scores."""
        if step < self.events[-1]:
            return False
        return scored >= self.enough or step >= (self.events + self.late_events)[-1]

    def is_over(self, step: int, scored: int) -> bool:
        """Return whether no rank will change any more."""
        return self.events_are_over(step, scored) and step >= (self.search or 0)

    def is_event(self, step: int) -> bool:
        """Return whether ranks may move after `step` unless events are over."""
        return step in self.events + self.late_events

    def passed(self, step: int) -> float:
        """Return the part of the planned events up to `step`."""
        return sum(event <= step for event in self.events) / len(self.events)


def event_steps(config: DynamicLoraConfig) -> tuple[int, ...]:
    """Return the steps after which ranks may change, counted from 1; short runs have fewer.

    Raises:
        ConfigError: If a falling budget meets an unknown run length.
    """
    if config.total_steps is None and config.budget_end is not None:
        raise ConfigError(
            "`total_steps` must be known where `budget_end` is set, got None: give the number "
            "of optimizer steps, so that the last cut comes in time."
        )
    return _steps(config, range(config.events))


def search_step(config: DynamicLoraConfig) -> int | None:
    """Return the step after which `budget_end="auto"` lowers the budget."""
    if config.budget_end != "auto" or config.total_steps is None:
        return None
    return max(1, round(SEARCH * config.total_steps))


def late_event_steps(config: DynamicLoraConfig) -> tuple[int, ...]:
    """Return the steps of further events at the same intervals, in a run with few scored ones."""
    if config.total_steps is None:
        return _steps(config, range(config.events, MOST_DOUBLINGS))
    apart = _apart(config)
    count = int((LATEST - config.last_event) / apart + 1e-9) if apart else 0
    return _steps(config, range(config.events, config.events + count))


def _steps(config: DynamicLoraConfig, indices: Iterable[int]) -> tuple[int, ...]:
    """Return the steps of events by their index, each step once."""
    total_steps = config.total_steps
    if total_steps is None:
        return tuple(FIRST_STEP_OF_UNKNOWN_LENGTH * 2**index for index in indices)
    fractions = (config.first_event + _apart(config) * index for index in indices)
    return tuple(sorted({max(1, round(fraction * total_steps)) for fraction in fractions}))


def _apart(config: DynamicLoraConfig) -> float:
    """Return the part of the run between events; 0 with one event."""
    return (config.last_event - config.first_event) / max(config.events - 1, 1)


def is_observed(events: Sequence[int], step: int) -> bool:
    """Return whether the next step is observed, after `step` steps of a run with `events`."""
    return step // BLOCK % _blocks_apart(events, step) == 0


def is_sampled(events: Sequence[int], step: int) -> bool:
    """Return whether the forwards of the next step are sampled, after `step` steps."""
    return step % BLOCK == 0 and is_observed(events, step)


def _blocks_apart(events: Sequence[int], step: int) -> int:
    last = max((event for event in events if event <= step), default=0)
    following = next((event for event in events if event > step), last)
    return min(MOST_APART, max(1, (following - last) // OBSERVATIONS))
