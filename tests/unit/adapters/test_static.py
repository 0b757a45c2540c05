"""How tensors are held: what is chosen, and what does not go with it."""

import logging

import pytest

from dynlora import DynamicLoraConfig
from dynlora.adapters.static import choose_mode
from dynlora.errors import ConfigError


@pytest.mark.parametrize(
    ("mode", "processes", "compiled", "chosen"),
    [
        ("auto", 1, False, "physical"),
        ("physical", 1, False, "physical"),
        ("static", 1, False, "static"),
        ("auto", 1, True, "static"),
        ("auto", 2, False, "static"),
        ("static", 2, True, "static"),
    ],
)
def test_tensors_are_static_where_an_engine_needs_it_or_it_is_asked_for(
    mode, processes, compiled, chosen
):
    config = DynamicLoraConfig(mode=mode)
    assert choose_mode(config, processes=processes, compiled=compiled) == chosen


def test_a_choice_is_said_in_the_log_with_its_reason(caplog):
    with caplog.at_level(logging.INFO, logger="dynlora"):
        choose_mode(DynamicLoraConfig(), processes=3, compiled=False)
        choose_mode(DynamicLoraConfig(mode="static"), processes=3, compiled=False)
        choose_mode(DynamicLoraConfig(), processes=1, compiled=False)
        choose_mode(DynamicLoraConfig(), processes=1, compiled=True)
    assert [record.getMessage() for record in caplog.records] == [
        "static mode: 3 processes train together",
        "static mode: torch.compile",
    ]


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"mode": "physical"}, 2, "`mode` must be 'static' or 'auto' where 2 processes"),
        ({"input_adaptive": True}, 2, "`input_adaptive` must be false in static mode"),
        ({"input_adaptive": True, "mode": "static"}, 1, "`input_adaptive` must be false"),
    ],
)
def test_what_needs_one_process_or_live_shapes_is_refused_by_name(settings, processes, message):
    with pytest.raises(ConfigError, match=message):
        choose_mode(DynamicLoraConfig(**settings), processes=processes, compiled=False)
