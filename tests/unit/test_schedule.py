"""When ranks may move: closed forms, short runs, unknown length."""

import pytest

from dynlora.schedule import event_steps

WINDOW = {"first_event": 0.15, "last_event": 0.5, "events": 5}


def test_events_are_spread_evenly_over_the_window():
    assert event_steps(total_steps=800, **WINDOW) == (120, 190, 260, 330, 400)


def test_a_single_event_comes_at_the_start_of_the_window():
    steps = event_steps(total_steps=1000, first_event=0.2, last_event=0.9, events=1)
    assert steps == (200,)


def test_a_window_without_width_gives_one_event():
    steps = event_steps(total_steps=1000, first_event=0.25, last_event=0.25, events=4)
    assert steps == (250,)


def test_a_window_that_ends_with_the_run_has_its_last_event_at_the_last_step():
    steps = event_steps(total_steps=40, first_event=0.5, last_event=1.0, events=3)
    assert steps == (20, 30, 40)


def test_with_unknown_length_the_intervals_double():
    assert event_steps(total_steps=None, **WINDOW) == (20, 40, 80, 160, 320)


@pytest.mark.parametrize("total_steps", [*range(1, 60), 1000, 99_999])
def test_events_lie_within_the_run_in_order_and_never_twice(total_steps):
    steps = event_steps(total_steps=total_steps, **WINDOW)
    assert list(steps) == sorted(set(steps))
    assert steps[0] >= 1
    assert steps[-1] <= total_steps
    assert len(steps) <= 5


def test_a_run_too_short_for_all_events_sees_fewer():
    assert event_steps(total_steps=4, **WINDOW) == (1, 2)


def test_a_run_of_one_step_has_one_event():
    assert event_steps(total_steps=1, **WINDOW) == (1,)
