"""Schedule: run length and settings in; event steps and observed steps out, in optimizer steps.

With a known length, events are evenly spaced early in training (the literature uses about 15 % to
50 %). Otherwise intervals double, so that 300 and 300,000 steps both get a few early events.
"""

from collections.abc import Sequence

from dynlora.config import DynamicLoraConfig
from dynlora.errors import ConfigError

FIRST_STEP_OF_UNKNOWN_LENGTH = 20
"""First event of a run of unknown length."""

OBSERVATIONS = 64
"""Fewest observed steps per event, if there are as many steps: twice the memory of the running mean
of gradients."""

FORWARDS_APART = 8
"""Observed steps per step with sampled forwards."""

MOST_APART = 8
"""Largest interval between observed steps."""


def event_steps(config: DynamicLoraConfig) -> tuple[int, ...]:
    """Return the steps after which ranks may change, counted from 1; short runs have fewer.

    Raises:
        ConfigError: If a falling budget meets an unknown run length.
    """
    events, total_steps = config.events, config.total_steps
    if total_steps is None:
        if config.budget_end is not None:
            raise ConfigError(
                "`total_steps` must be known where `budget_end` is set, got None: give the number "
                "of optimizer steps, so that the last cut comes in time."
            )
        return tuple(FIRST_STEP_OF_UNKNOWN_LENGTH * 2**index for index in range(events))
    span = (config.last_event - config.first_event) / max(events - 1, 1)
    fractions = (config.first_event + span * index for index in range(events))
    return tuple(sorted({max(1, round(fraction * total_steps)) for fraction in fractions}))


def observation_interval(events: Sequence[int], step: int) -> int:
    """Return the interval between observed steps, after `step` steps of a run with `events`."""
    last = max((event for event in events if event <= step), default=0)
    following = next((event for event in events if event > step), last)
    return min(MOST_APART, max(1, (following - last) // OBSERVATIONS))


def is_sampled(events: Sequence[int], step: int) -> bool:
    """Return whether the forwards of the next step are sampled, after `step` steps."""
    return step % (FORWARDS_APART * observation_interval(events, step)) == 0
