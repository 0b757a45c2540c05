"""When ranks may move, and which steps are looked at before: both in optimizer steps.

With a known length, events are spread evenly over a window early in training (literature puts it at
about 15 % to 50 %), then ranks hold. With an unknown length the intervals double, so that a run of
300 steps and one of 300,000 both see a handful of early events and then hold.
"""

from collections.abc import Sequence

FIRST_STEP_OF_UNKNOWN_LENGTH = 20
"""Optimizer steps before the first event when the run's length is unknown."""

OBSERVATIONS = 64
"""Observed steps from which an event is planned, where there are as many: twice the memory of a
running mean of gradients."""

FORWARDS_APART = 8
"""Observed steps from one whose forwards are sampled to the next."""

MOST_APART = 8
"""Most steps from one observed step to the next, however far events are apart."""


def event_steps(
    *, total_steps: int | None, first_event: float, last_event: float, events: int
) -> tuple[int, ...]:
    """Return the steps (counted from 1, after the optimizer's step) at which ranks may move.

    Args:
        total_steps: Optimizer steps of the whole run; None if unknown.
        first_event: Fraction of `total_steps` at the first event, in ``(0, 1]``.
        last_event: Fraction of `total_steps` at the last event, in ``[first_event, 1]``.
        events: Number of events, at least 1; a run too short for them sees fewer.
    """
    if total_steps is None:
        return tuple(FIRST_STEP_OF_UNKNOWN_LENGTH * 2**index for index in range(events))
    span = (last_event - first_event) / max(events - 1, 1)
    fractions = (first_event + span * index for index in range(events))
    return tuple(sorted({max(1, round(fraction * total_steps)) for fraction in fractions}))


def observation_interval(events: Sequence[int], step: int) -> int:
    """Return the number of steps from one observed step to the next, after `step` steps.

    Between events that are far apart not every gradient is needed, and what is not looked at costs
    nothing.

    Args:
        events: As `event_steps` returns them.
        step: Optimizer steps taken.
    """
    last = max((event for event in events if event <= step), default=0)
    following = next((event for event in events if event > step), last)
    return min(MOST_APART, max(1, (following - last) // OBSERVATIONS))


def is_sampled(events: Sequence[int], step: int) -> bool:
    """Return whether the forwards of the step after `step` steps are sampled.

    Args:
        events: As `event_steps` returns them.
        step: Optimizer steps taken.
    """
    return step % (FORWARDS_APART * observation_interval(events, step)) == 0
