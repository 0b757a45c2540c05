"""When ranks may move and which steps are observed: closed forms, short runs, unknown length."""

from dynlora.schedule import (
    FORWARDS_APART,
    MOST_APART,
    OBSERVATIONS,
    event_steps,
    is_sampled,
    observation_interval,
)

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


def test_events_lie_within_the_run_in_order_and_never_twice():
    for total_steps in (*range(1, 60), 1000, 99_999):
        steps = event_steps(total_steps=total_steps, **WINDOW)
        assert list(steps) == sorted(set(steps))
        assert steps[0] >= 1
        assert steps[-1] <= total_steps
        assert len(steps) <= 5


def test_a_run_too_short_for_all_events_sees_fewer():
    assert event_steps(total_steps=4, **WINDOW) == (1, 2)


def test_a_run_of_one_step_has_one_event():
    assert event_steps(total_steps=1, **WINDOW) == (1,)


def test_every_step_is_observed_before_events_close_to_one_another():
    events = event_steps(total_steps=345, first_event=0.05, last_event=0.3, events=5)
    assert {observation_interval(events, step) for step in range(345)} == {1}


def test_before_a_far_event_as_many_steps_are_observed_as_a_plan_needs():
    steps = [step for step in range(200, 456) if step % observation_interval((200, 456), step) == 0]
    assert steps == list(range(200, 456, 4))
    assert len(steps) == OBSERVATIONS


def test_observed_steps_are_never_further_apart_than_a_limit():
    assert observation_interval((1_000_000,), 0) == MOST_APART


def test_after_the_last_event_the_interval_is_one():
    assert {observation_interval((10_000,), step) for step in (10_000, 99_999)} == {1}


def test_forwards_are_sampled_at_the_start_and_then_in_one_step_of_every_interval():
    sampled = [is_sampled((40,), step) for step in range(3 * FORWARDS_APART)]
    assert sampled == 3 * [True, *(FORWARDS_APART - 1) * [False]]


def test_where_observed_steps_are_further_apart_so_are_sampled_ones():
    far = (1, 1 + 4 * OBSERVATIONS)
    interval = FORWARDS_APART * observation_interval(far, 1)
    assert interval > FORWARDS_APART
    steps = [step for step in range(1, far[1]) if is_sampled(far, step)]
    assert steps == list(range(interval, far[1], interval))
