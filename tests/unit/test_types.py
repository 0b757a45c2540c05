"""The values that stages exchange: frozen, and an event survives JSON unchanged."""

import json
from dataclasses import FrozenInstanceError

import pytest
import torch

from dynlora import Event, LayerEvent, RankPlan
from dynlora.types import BasisChange

SEEN = LayerEvent(
    rank_before=4,
    rank_after=7,
    score=0.1 + 0.2,
    share=1 / 3,
    weight=1.0,
    variance=2.5e-7,
    effective_rank=11.25,
    output_lost=0.0,
    waits=False,
    directions=4.5,
)
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


def test_an_event_survives_json_unchanged():
    event = Event(step=30, parameters=1234, agreement=2.5, layers={"a.q": SEEN, "a.k": UNSEEN})
    assert Event.from_dict(json.loads(json.dumps(event.to_dict()))) == event


def test_an_event_written_before_directions_were_counted_is_read():
    values = Event(step=30, parameters=1234, agreement=2.5, layers={"a.k": UNSEEN}).to_dict()
    del values["layers"]["a.k"]["directions"]
    assert Event.from_dict(values).layers == {"a.k": UNSEEN}


def test_an_event_is_written_with_every_figure_of_every_layer():
    values = Event(step=30, parameters=1234, agreement=2.5, layers={"a.k": UNSEEN}).to_dict()
    assert values == {
        "step": 30,
        "parameters": 1234,
        "agreement": 2.5,
        "layers": {
            "a.k": {
                "rank_before": 4,
                "rank_after": 1,
                "score": None,
                "share": 2 / 3,
                "weight": 0.5,
                "variance": None,
                "effective_rank": None,
                "output_lost": 0.03,
                "waits": True,
                "directions": None,
            }
        },
    }


def test_a_plan_cannot_be_changed():
    plan = RankPlan(step=1, ranks={"a": 2})
    with pytest.raises(FrozenInstanceError, match="step"):
        plan.step = 2


def test_a_basis_change_keeps_the_scale_unless_told():
    change = BasisChange(name="a", to_A=torch.eye(2, 3), to_B=torch.eye(3, 2))
    assert change.scale_ratio == 1.0
