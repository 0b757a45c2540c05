"""How tensors are held: what is chosen, and what does not go with it."""

import logging

import pytest

from dynlora import DynamicLoraConfig
from dynlora.adapters.static import choose_mode
from dynlora.errors import ConfigError


@pytest.mark.parametrize(
    ("mode", "processes", "compiled", "chosen", "said"),
    [
        ("auto", 1, False, "physical", []),
        ("physical", 1, False, "physical", []),
        ("static", 1, False, "static", []),
        ("auto", 1, True, "static", ["static mode: torch.compile"]),
        ("auto", 3, False, "physical", []),
        ("physical", 3, False, "physical", []),
        ("static", 2, True, "static", []),
    ],
)
def test_tensors_are_static_where_an_engine_needs_it_which_is_said_or_it_is_asked_for(
    mode, processes, compiled, chosen, said, caplog
):
    caplog.set_level(logging.INFO, logger="dynlora")
    config = DynamicLoraConfig(mode=mode)
    assert choose_mode(config, processes=processes, compiled=compiled) == chosen
    assert caplog.messages == said


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"input_adaptive": True}, 2, "`input_adaptive` must be false in 2 processes"),
        ({"input_adaptive": True, "mode": "static"}, 1, "`input_adaptive` must be false"),
    ],
)
def test_what_needs_one_process_or_live_shapes_is_refused_by_name(settings, processes, message):
    with pytest.raises(ConfigError, match=message):
        choose_mode(DynamicLoraConfig(**settings), processes=processes, compiled=False)
