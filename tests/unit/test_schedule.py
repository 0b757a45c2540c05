"""When ranks may move and which steps are observed: closed forms, short runs, unknown length."""

import pytest

from dynlora import DynamicLoraConfig
from dynlora.schedule import (
    FORWARDS_APART,
    MOST_APART,
    OBSERVATIONS,
    event_steps,
    is_sampled,
    observation_interval,
)


@pytest.mark.parametrize(
    ("total_steps", "first", "last", "events", "steps"),
    [
        (800, 0.15, 0.5, 5, (120, 190, 260, 330, 400)),
        (1000, 0.2, 0.9, 1, (200,)),  # a single event comes at the start of the window
        (1000, 0.25, 0.25, 4, (250,)),
        (40, 0.5, 1.0, 3, (20, 30, 40)),
        (None, 0.15, 0.5, 5, (20, 40, 80, 160, 320)),
        (4, 0.15, 0.5, 5, (1, 2)),
        (1, 0.15, 0.5, 5, (1,)),
    ],
)
def test_events_are_spread_evenly_over_the_window_or_double(
    total_steps, first, last, events, steps
):
    window = {"first_event": first, "last_event": last, "events": events}
    assert event_steps(DynamicLoraConfig(total_steps=total_steps, **window)) == steps


def test_events_lie_within_the_run_in_order_and_never_twice():
    for total_steps in (*range(1, 60), 99_999):
        window = {"first_event": 0.15, "last_event": 0.5, "events": 5}
        steps = event_steps(DynamicLoraConfig(total_steps=total_steps, **window))
        assert list(steps) == sorted(set(steps))
        assert 1 <= steps[0] <= steps[-1] <= total_steps


def test_steps_are_observed_as_often_as_a_plan_needs_within_limits():
    close = event_steps(DynamicLoraConfig(total_steps=345))
    assert {observation_interval(close, step) for step in range(345)} == {1}
    steps = [step for step in range(200, 456) if step % observation_interval((200, 456), step) == 0]
    assert steps == list(range(200, 456, 4))
    assert len(steps) == OBSERVATIONS
    assert observation_interval((1_000_000,), 0) == MOST_APART
    assert observation_interval((10_000,), 99_999) == 1  # after the last event


def test_forwards_are_sampled_at_the_start_and_then_in_one_observed_step_of_several():
    sampled = [is_sampled((40,), step) for step in range(3 * FORWARDS_APART)]
    assert sampled == 3 * [True, *(FORWARDS_APART - 1) * [False]]
    far = (1, 1 + 4 * OBSERVATIONS)
    steps = [step for step in range(1, far[1]) if is_sampled(far, step)]
    assert steps == list(range(4 * FORWARDS_APART, far[1], 4 * FORWARDS_APART))
