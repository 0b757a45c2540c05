"""The values that stages exchange: frozen, and an event survives JSON unchanged."""

import json
from dataclasses import replace

from dynlora import Event, LayerEvent

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
