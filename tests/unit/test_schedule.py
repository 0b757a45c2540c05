"""When ranks may move and which steps are observed: closed forms, short runs, unknown length."""

import pytest

from dynlora import DynamicLoraConfig
from dynlora.schedule import (
    BLOCK,
    MOST_APART,
    OBSERVATIONS,
    event_steps,
    is_observed,
    is_sampled,
    late_event_steps,
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


@pytest.mark.parametrize(
    ("total_steps", "first", "last", "events", "steps"),
    [
        (1000, 0.1, 0.3, 3, (400, 500, 600)),
        (1000, 0.05, 0.3, 5, (362, 425, 488, 550)),
        (1000, 0.05, 0.95, 19, ()),
        (1000, 0.2, 0.2, 1, ()),
    ],
)
def test_events_go_on_at_the_same_intervals_up_to_three_fifths_of_the_run(
    total_steps, first, last, events, steps
):
    window = {"first_event": first, "last_event": last, "events": events}
    assert late_event_steps(DynamicLoraConfig(total_steps=total_steps, **window)) == steps


def test_events_go_on_doubling_in_a_run_of_unknown_length():
    assert late_event_steps(DynamicLoraConfig(events=5))[:3] == (640, 1280, 2560)


def test_events_lie_within_the_run_in_order_and_never_twice():
    for total_steps in (*range(1, 60), 99_999):
        window = {"first_event": 0.15, "last_event": 0.5, "events": 5}
        steps = event_steps(DynamicLoraConfig(total_steps=total_steps, **window))
        assert list(steps) == sorted(set(steps))
        assert 1 <= steps[0] <= steps[-1] <= total_steps


def test_blocks_of_steps_are_observed_as_often_as_a_plan_needs_within_limits():
    close = event_steps(DynamicLoraConfig(total_steps=345))
    assert all(is_observed(close, step) for step in range(345))
    observed = [step for step in range(256, 512) if is_observed((256, 512), step)]
    assert observed == [start + place for start in range(256, 512, 32) for place in range(BLOCK)]
    assert len(observed) == OBSERVATIONS
    assert sum(is_observed((1_000_000,), step) for step in range(8_000)) == 8_000 / MOST_APART
    assert is_observed((10_000,), 99_999)  # after the last event


def test_forwards_are_sampled_in_the_first_step_of_a_block():
    for events in ((40,), (1, 1 + 4 * OBSERVATIONS)):
        sampled = [step for step in range(256) if is_sampled(events, step)]
        observed = [step for step in range(256) if is_observed(events, step)]
        assert sampled == [step for step in observed if step % BLOCK == 0]
