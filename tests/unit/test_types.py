"""The values that stages exchange: frozen, and an event survives JSON unchanged."""

import json
import re
from dataclasses import replace

import pytest

from dynlora import Event, LayerEvent
from dynlora.types import moved, nothing_compared, stillness
from tests.unit.events import make_event

UNSEEN = LayerEvent(
    rank_before=4,
    rank_after=1,
    score=None,
    share=2 / 3,
    weight=0.5,
    variance=None,
    effective_rank=None,
    output_lost=0.03,
    waits=True,
)


def test_an_event_survives_json_unchanged_and_is_read_without_directions():
    seen = replace(UNSEEN, score=0.1 + 0.2, variance=2.5e-7, directions=4.5, waits=False)
    event = Event(step=30, parameters=1234, agreement=2.5, layers={"a.q": seen, "a.k": UNSEEN})
    values = json.loads(json.dumps(event.to_dict()))
    assert Event.from_dict(values) == event
    del values["layers"]["a.k"]["directions"]  # as earlier versions wrote it
    assert Event.from_dict(values) == event


# The reason why no rank changed.

STILL = {"a": 4, "b": 4}
SCORES = {"a": 2.0, "b": 1.0}


def test_there_is_no_reason_if_a_rank_moved_even_if_it_moved_back():
    away = make_event(3, STILL, {"a": 5, "b": 3}, scores=SCORES)
    back = make_event(6, {"a": 5, "b": 3}, STILL, scores=SCORES)
    assert stillness([away, back]) is None
    assert moved(away)
    assert not moved(make_event(3, STILL, STILL))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "beyond chance"),
        ({"scores": {"a": 1.0, "b": 1.0}}, "every layer had the same score"),
        ({"scores": {"a": 1.0, "b": None}}, "every layer had the same score"),
        ({"scores": SCORES, "waits": ("b",)}, "1 layer .*dynamic.shrink_tolerance"),
        ({"scores": SCORES}, "dynamic.hysteresis"),
    ],
)
def test_the_reason_is_the_first_stage_that_held_ranks(given, reason):
    events = [make_event(step, STILL, STILL, **given) for step in (3, 6)]
    assert re.search(reason, stillness(events))


def test_a_run_without_events_or_without_comparisons_has_its_own_reason():
    assert "no event came" in stillness([])
    events = [replace(make_event(3, STILL, STILL), agreement=0.0)]
    assert "`observe()` was not called" in stillness(events)
    assert nothing_compared(events)
