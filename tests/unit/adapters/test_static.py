"""How tensors are held: what is chosen, and what does not go with it."""

import pytest

from dynlora import DynamicLoraConfig
from dynlora.adapters.static import choose_mode
from dynlora.errors import ConfigError


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(
    ("mode", "chosen"), [("auto", "physical"), ("physical", "physical"), ("static", "static")]
)
def test_tensors_are_static_only_where_it_is_asked_for(mode, chosen, processes):
    assert choose_mode(DynamicLoraConfig(mode=mode), processes=processes, compiled=True) == chosen


def test_tensors_that_are_padded_already_stay_static():
    assert (
        choose_mode(DynamicLoraConfig(), processes=1, compiled=False, held_static=True) == "static"
    )
    with pytest.raises(ConfigError, match="a model that was made static, got 'physical'"):
        choose_mode(
            DynamicLoraConfig(mode="physical"), processes=1, compiled=False, held_static=True
        )


@pytest.mark.parametrize(
    ("mode", "processes", "compiled", "where"),
    [
        ("auto", 2, False, "2 processes"),
        ("static", 1, False, "static mode"),
        ("auto", 1, True, "compiled models"),
    ],
)
def test_input_adaptive_ranks_are_refused_by_name(mode, processes, compiled, where):
    config = DynamicLoraConfig(input_adaptive=True, mode=mode)
    with pytest.raises(ConfigError, match=f"`input_adaptive` must be false in {where}, but got"):
        choose_mode(config, processes=processes, compiled=compiled)
