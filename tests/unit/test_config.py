"""The configuration refuses every value outside its range, by name, range and value."""

import json
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

OUTSIDE = [
    ({"temperature": 0.0}, r"`temperature` must be above 0, got 0\.0"),
    ({"temperature": -0.5}, r"`temperature` must be above 0, got -0\.5"),
    ({"temperature": float("nan")}, r"`temperature` must be above 0, got nan"),
    ({"uniform_mix": -0.1}, r"`uniform_mix` must be in \[0, 1\], got -0\.1"),
    ({"uniform_mix": 1.1}, r"`uniform_mix` must be in \[0, 1\], got 1\.1"),
    ({"feature_weight": 2.0}, r"`feature_weight` must be in \[0, 1\], got 2\.0"),
    ({"min_rank": 0}, r"`min_rank` must be at least 1, got 0"),
    ({"min_rank": 4, "max_rank": 3}, r"`max_rank` must be at least min_rank=4, got 3"),
    ({"total_steps": 0}, r"`total_steps` must be at least 1, got 0"),
    ({"first_event": 0.0}, r"`first_event` must be in \(0, 1\], got 0\.0"),
    ({"first_event": 1.5, "last_event": 1.5}, r"`first_event` must be in \(0, 1\], got 1\.5"),
    ({"last_event": 0.01}, r"`last_event` must be in \[first_event=0\.05, 1\], got 0\.01"),
    ({"last_event": 1.01}, r"`last_event` must be in \[first_event=0\.05, 1\], got 1\.01"),
    ({"events": 0}, r"`events` must be at least 1, got 0"),
    ({"hysteresis": -0.25}, r"`hysteresis` must be at least 0, finite, got -0\.25"),
    ({"hysteresis": float("inf")}, r"`hysteresis` must be at least 0, finite, got inf"),
    ({"shrink_tolerance": -0.01}, r"`shrink_tolerance` must be in \[0, 1\], got -0\.01"),
    ({"shrink_tolerance": 1.5}, r"`shrink_tolerance` must be in \[0, 1\], got 1\.5"),
]

ON_THE_EDGE = [
    {"uniform_mix": 0.0},
    {"uniform_mix": 1.0},
    {"feature_weight": 1.0},
    {"min_rank": 3, "max_rank": 3},
    {"total_steps": 1},
    {"first_event": 1.0, "last_event": 1.0},
    {"first_event": 0.3, "last_event": 0.3},
    {"events": 1},
    {"hysteresis": 0.0},
    {"shrink_tolerance": 0.0},
    {"shrink_tolerance": 1.0},
]


@pytest.mark.parametrize(("values", "message"), OUTSIDE)
def test_a_value_outside_its_range_is_refused_with_range_and_value(values, message):
    with pytest.raises(ConfigError, match=message):
        DynamicLoraConfig(**values)


def unchecked(**values):
    """Make a configuration without the tests' type checker, which would refuse a value first."""
    return runpy.run_path(dynlora.config.__file__)["DynamicLoraConfig"](**values)


@pytest.mark.parametrize("values", ON_THE_EDGE)
def test_the_ends_of_a_closed_range_are_allowed(values):
    given = asdict(DynamicLoraConfig(**values))
    assert {key: given[key] for key in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"importance": "signals"}, "`importance` must be one of signal, .*, got signals"),
        ({"on_nonfinite": "raise"}, "`on_nonfinite` must be one of skip, stop, got raise"),
        ({"mode": "fixed"}, "`mode` must be one of auto, physical, static, got fixed"),
        ({"feature": "norm"}, "`feature` must be one of effective_rank, variance, got norm"),
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


def test_what_is_no_number_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"`temperature` must be a number, got '0\.5'"):
        unchecked(temperature="0.5")


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="rank_max"):
        DynamicLoraConfig(rank_max=3)


def test_settings_cannot_be_given_by_position():
    with pytest.raises(TypeError, match="positional argument"):
        DynamicLoraConfig("signal")


def test_a_configuration_cannot_be_changed_afterwards():
    config = DynamicLoraConfig()
    with pytest.raises(FrozenInstanceError, match="min_rank"):
        config.min_rank = 2


def test_the_default_preset_is_what_the_class_has():
    assert DynamicLoraConfig.from_preset("default") == DynamicLoraConfig()


def test_a_preset_gives_what_is_not_given():
    config = DynamicLoraConfig.from_preset("paper", events=8, temperature=0.7)
    given = asdict(config)
    assert (given.pop("events"), given.pop("temperature")) == (8, 0.7)
    own = {key: value for key, value in PRESETS["paper"].items() if key in given}
    assert given.items() >= own.items()
    others = given.keys() - own.keys()
    defaults = asdict(DynamicLoraConfig())
    assert {key: given[key] for key in others} == {key: defaults[key] for key in others}


def test_the_papers_preset_follows_normalised_gradients_and_variance_over_the_whole_run():
    config = DynamicLoraConfig.from_preset("paper")
    assert (config.importance, config.feature) == ("gradient_norm", "variance")
    assert (config.temperature, config.uniform_mix) == (1.0, 0.0), "shares are the scores'"
    assert config.feature_weight > 0
    assert config.layer_weights
    steps = event_steps(
        total_steps=1000,
        first_event=config.first_event,
        last_event=config.last_event,
        events=config.events,
    )
    assert steps == tuple(range(50, 951, 50))


def test_every_preset_has_a_name_that_types_know_and_says_more_than_the_default():
    assert tuple(PRESETS) == get_args(PresetName)
    defaults = asdict(DynamicLoraConfig())
    for values in PRESETS.values():
        assert all(defaults[key] != value for key, value in values.items())


@pytest.mark.parametrize("name", ["papr", "", None])
def test_an_unknown_preset_is_told_which_there_are(name):
    unchecked = runpy.run_path(dynlora.config.__file__)["DynamicLoraConfig"]
    with pytest.raises(ConfigError, match=rf"`preset` must be one of default, paper, got {name}"):
        unchecked.from_preset(name)
