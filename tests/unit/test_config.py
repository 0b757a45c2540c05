"""The configuration refuses every value outside its range, by name, range and value."""

import json
import re
import runpy
from dataclasses import FrozenInstanceError, asdict
from typing import get_args

import numpy
import pytest

import dynlora.config
from dynlora import DynamicLoraConfig
from dynlora.config import PRESETS, PresetName
from dynlora.errors import ConfigError
from dynlora.schedule import event_steps

NAN, INF = float("nan"), float("inf")
ALLOWED = [
    ("temperature", "above 0", [0.01], [0.0, -0.5, NAN]),
    ("uniform_mix", "in [0, 1]", [0.0, 1.0], [-0.1, 1.1]),
    ("feature_weight", "in [0, 1]", [0.0, 1.0], [2.0]),
    ("min_rank", "at least 1", [1], [0]),
    ("max_rank", "at least min_rank=1", [1], [0]),
    ("budget_end", "in (0, 1], or auto", [0.1, 1.0, "auto"], [0.0, 1.5]),
    ("budget_tolerance", "in [0, 1]", [0.0, 1.0], [-0.1, 1.5]),
    ("total_steps", "at least 1", [1], [0]),
    ("first_event", "in (0, 1]", [0.3], [0.0, 1.5]),
    ("last_event", "in [first_event=0.05, 1]", [0.05, 1.0], [0.01, 1.01]),
    ("events", "at least 1", [1], [0]),
    ("hysteresis", "at least 0, finite", [0.0], [-0.25, INF]),
    ("shrink_tolerance", "in [0, 1]", [0.0, 1.0], [-0.01, 1.5]),
]


@pytest.mark.parametrize(("name", "required", "inside", "outside"), ALLOWED)
def test_a_value_outside_its_closed_range_is_refused_with_range_and_value(
    name, required, inside, outside
):
    for value in inside:
        assert asdict(DynamicLoraConfig(**{name: value}))[name] == value
    for value in outside:
        with pytest.raises(
            ConfigError, match=re.escape(f"`{name}` must be {required}, got {value}")
        ):
            DynamicLoraConfig(**{name: value})


def unchecked(**values):
    """Make a configuration without the tests' type checker, which would refuse a value first."""
    return runpy.run_path(dynlora.config.__file__)["DynamicLoraConfig"](**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"importance": "signals"}, "`importance` must be one of signal, .*, got signals"),
        ({"on_nonfinite": "raise"}, "`on_nonfinite` must be one of skip, stop, got raise"),
        ({"feature": "norm"}, "`feature` must be one of effective_rank, variance, got norm"),
        ({"fused": "false"}, "`fused` must be true or false, got 'false'"),
        ({"budget_end": True}, r"`budget_end` must be a number, got True"),
        ({"temperature": "0.5"}, r"`temperature` must be a number, got '0\.5'"),
        ({"pinned": "*q_proj"}, r"`pinned` must be a tuple of patterns, got the text '\*q_proj'"),
    ],
)
def test_what_a_type_checker_would_refuse_is_refused_with_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message):
        unchecked(**values)


@pytest.mark.parametrize("name", ["min_rank", "max_rank", "total_steps", "events", "seed"])
def test_whole_numbers_of_numpy_become_pythons_and_others_are_refused(name):
    config = unchecked(**{name: numpy.int64(3)})
    assert json.loads(json.dumps(asdict(config)))[name] == 3
    with pytest.raises(ConfigError, match=rf"`{name}` must be a whole number, got 7\.5"):
        unchecked(**{name: 7.5})


@pytest.mark.parametrize(
    ("name", "value"), [("hysteresis", numpy.float32(0.5)), ("pinned", {"*.b", "*.a"})]
)
def test_what_no_json_can_hold_becomes_what_it_can(name, value):
    config = unchecked(**{name: value})
    kept = json.loads(json.dumps(asdict(config)))[name]
    assert kept == (["*.a", "*.b"] if name == "pinned" else 0.5)


def test_settings_are_frozen_and_of_known_names():
    with pytest.raises(TypeError, match="rank_max"):
        DynamicLoraConfig(rank_max=3)
    with pytest.raises(FrozenInstanceError, match="min_rank"):
        DynamicLoraConfig().min_rank = 2


def test_a_preset_gives_what_is_not_given():
    assert tuple(PRESETS) == get_args(PresetName)
    defaults = asdict(DynamicLoraConfig())
    assert asdict(DynamicLoraConfig.from_preset("default")) == defaults
    config = DynamicLoraConfig.from_preset("paper", events=8, temperature=0.7)
    assert asdict(config) == defaults | PRESETS["paper"] | {"events": 8, "temperature": 0.7}


def test_the_papers_preset_follows_normalised_gradients_and_variance_over_the_whole_run():
    config = DynamicLoraConfig.from_preset("paper", total_steps=1000)
    assert (config.importance, config.feature) == ("gradient_norm", "variance")
    assert (config.temperature, config.uniform_mix) == (1.0, 0.0), "shares are the scores'"
    assert config.feature_weight > 0
    assert config.layer_weights
    assert event_steps(config) == tuple(range(50, 951, 50))


@pytest.mark.parametrize("name", ["papr", "", None])
def test_an_unknown_preset_is_told_which_there_are(name):
    unchecked = runpy.run_path(dynlora.config.__file__)["DynamicLoraConfig"]
    with pytest.raises(ConfigError, match=rf"`preset` must be one of default, paper, got {name}"):
        unchecked.from_preset(name)
