"""Events survive JSON unchanged, and what they say in words."""

import json
import re
from dataclasses import replace

import pytest

from dynlora import Event, LayerEvent
from dynlora.history import conclusion, describe, moved, reasons, stillness, summary
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


def test_an_event_survives_json_unchanged_and_is_printed_in_one_line():
    seen = replace(UNSEEN, score=0.1 + 0.2, variance=2.5e-7, directions=4.5, waits=False)
    event = Event(step=30, parameters=1234, agreement=2.5, layers={"a.q": seen, "a.k": UNSEEN})
    values = json.loads(json.dumps(event.to_dict()))
    assert Event.from_dict(values) == event
    assert repr(event) == "Event(step=30, parameters=1234, agreement=2.5, changed=2 of 2)"


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


RANKS = {"bert.layer.0.query": 4, "bert.layer.0.output": 4, "bert.layer.1.query": 4}


@pytest.mark.parametrize(
    ("after", "scores", "line"),
    [
        ((4, 9, 1), 1.0, "2 of 3 layers changed rank; most gained: 0.output 4 → 9; agreement 3.0"),
        ((4, 2, 3), 1.0, "2 of 3 layers changed rank; most lost: 0.output 4 → 2; agreement 3.0"),
        ((4, 4, 4), None, "no rank changed; agreement 3.0 of 2.5"),
    ],
)
def test_an_event_is_told_in_a_line_with_the_layer_that_changed_most(after, scores, line):
    given = None if scores is None else dict.fromkeys(RANKS, scores)
    event = make_event(3, RANKS, dict(zip(RANKS, after, strict=True)), scores=given)
    assert describe(event) == line


def test_a_run_with_moves_is_told_in_three_lines():
    first, last = {"a": 4, "b": 4, "c": 4}, {"a": 8, "b": 1, "c": 4}
    events = [make_event(3, first, first), make_event(6, first, last), make_event(9, last, last)]
    assert conclusion(events).splitlines() == [
        "ranks are final; they moved at 1 of 3 events (layers: 1 up, 1 down)",
        "gained most: a 4 → 8",
        "lost most: b 4 → 1",
    ]


def test_the_summary_lists_each_layer_with_its_first_and_its_present_rank():
    first = dict(zip(RANKS, (3, 8, 1), strict=True))
    now = dict(zip(RANKS, (2, 9, 1), strict=True))
    scores = dict.fromkeys(RANKS, 0.5)
    events = [make_event(3, RANKS, first), make_event(6, first, now, scores=scores)]
    rows = [line.split() for line in summary(now, events).splitlines()]
    assert rows[1:] == [["0.query", "4", "2", "0.5", "0"], ["0.output", "4", "9", "0.5", "0"],
                        ["1.query", "4", "1", "0.5", "0"]]  # fmt: skip
    assert [line.split() for line in summary(RANKS, []).splitlines()][1] == ["0.query", "4", "4"]


def test_each_layer_has_a_reason_for_its_rank():
    first, last = {"a": 4, "b": 4, "c": 4}, {"a": 8, "b": 1, "c": 3}
    scores = {"a": 2.0, "b": 0.5, "c": None}
    early = make_event(3, first, first)
    late = make_event(6, first, last, scores=scores, waits=("c",))
    layers = dict(late.layers)
    layers["a"] = replace(layers["a"], directions=22.4)
    layers["b"] = replace(layers["b"], output_lost=0.031)
    why = reasons([early, replace(late, layers=layers)])
    assert why["a"] == "score 1 of 2, gradients in 22 directions"
    assert why["b"] == "score 2 of 2, its largest cut lost 3.1 % of its output"
    assert why["c"].startswith("no score, shrinking further would lose more")
    assert set(reasons([early]).values()) == {"no layer was scored"}
    tied = make_event(6, first, first, scores={"a": 0.5, "b": 1.0, "c": 1.0})
    assert [*reasons([tied]).values()] == ["score 3 of 3", "score 1 of 3", "score 1 of 3"]


def test_an_agreement_below_the_threshold_is_not_rounded_up_to_it():
    event = replace(make_event(3, RANKS, RANKS), agreement=2.47)
    assert describe(event) == "no rank changed; agreement 2.4 of 2.5"
