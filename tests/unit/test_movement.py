"""Why ranks stayed where they were."""

from dataclasses import replace

from dynlora.movement import moved, nothing_compared, stillness
from tests.unit.events import make_event

STILL = {"a": 4, "b": 4}


def test_nothing_is_said_where_a_rank_moved_even_if_it_moved_back() -> None:
    away = make_event(3, STILL, {"a": 5, "b": 3}, scores={"a": 2.0, "b": 1.0})
    back = make_event(6, {"a": 5, "b": 3}, STILL, scores={"a": 1.0, "b": 2.0})
    assert stillness([away, back]) is None
    assert moved(away)
    assert not moved(make_event(3, STILL, STILL))


def test_a_run_without_events_says_so() -> None:
    reason = stillness([])
    assert reason is not None
    assert "no event came" in reason


def test_missing_scores_mean_that_progress_was_not_beyond_chance() -> None:
    reason = stillness([make_event(3, STILL, STILL), make_event(6, STILL, STILL)])
    assert reason is not None
    assert "beyond chance" in reason


def test_equal_scores_are_told_as_such() -> None:
    events = [make_event(step, STILL, STILL, scores={"a": 1.0, "b": 1.0}) for step in (3, 6)]
    assert stillness(events) == "every layer had the same score"


def test_equal_scores_are_told_as_such_where_a_layer_without_gradients_has_none() -> None:
    events = [make_event(step, STILL, STILL, scores={"a": 1.0, "b": None}) for step in (3, 6)]
    assert stillness(events) == "every layer had the same score"


def test_layers_that_wait_are_counted_once() -> None:
    scores = {"a": 2.0, "b": 1.0}
    events = [make_event(step, STILL, STILL, scores=scores, waits=("b",)) for step in (3, 6)]
    reason = stillness(events)
    assert reason is not None
    assert reason.startswith("1 layer ")
    assert "dynamic.shrink_tolerance" in reason


def test_else_the_scores_were_too_close() -> None:
    reason = stillness([make_event(3, STILL, STILL, scores={"a": 1.1, "b": 1.0})])
    assert reason == "no layer that could grow stood out by more than dynamic.hysteresis"


def test_gradients_that_nobody_read_are_told_as_such() -> None:
    events = [replace(make_event(step, STILL, STILL), agreement=0.0) for step in (3, 6)]
    reason = stillness(events)
    assert reason is not None
    assert "`observe()` was not called" in reason
    assert nothing_compared(events)
    assert not nothing_compared([*events, make_event(9, STILL, STILL)])
    assert not nothing_compared([])
