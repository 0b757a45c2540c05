"""Shares over their whole domain: a split, blind to order, and as held where scores say nothing."""

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynlora.adjuster import spread_excess
from dynlora.allocator import (
    allocate_layer_weights,
    allocate_shares,
)
from dynlora.types import is_informative

SCORES = st.floats(0, allow_nan=False, allow_infinity=False)
GAINS = st.floats(0.01, 100)
many = settings(deadline=None, max_examples=50, derandomize=True)


@st.composite
def splits(draw, scores=SCORES, all_scored=False):
    """Draw everything that `allocate_shares` takes: some layers lack a score, some a gain."""
    costs = draw(st.dictionaries(st.text(max_size=3), st.integers(1, 10**9), min_size=1))
    scored = list(costs) if all_scored else draw(st.lists(st.sampled_from(list(costs))))
    gained = draw(st.lists(st.sampled_from(list(costs))))
    return {
        "scores": {name: draw(scores) for name in scored},
        "costs": costs,
        "held": {name: draw(st.integers(1, 1000)) for name in costs},
        "gains": {name: draw(GAINS) for name in gained},
        "temperature": draw(st.floats(0.01, 100)),
        "uniform_mix": draw(st.floats(0, 1)),
    }


def reversed_dict(values):
    return dict(reversed(list(values.items())))


def uniform(costs):
    return {name: cost / sum(costs.values()) for name, cost in costs.items()}


@many
@given(splits())
def test_shares_sum_to_one_keep_the_uniform_part_and_do_not_depend_on_order(split):
    shares = allocate_shares(**split)
    assert shares.keys() == split["costs"].keys()
    assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-9)
    part = split["uniform_mix"] if is_informative(split["scores"]) else 0
    for name, base in uniform(split["costs"]).items():
        assert shares[name] >= part * base
    turned = {
        key: reversed_dict(value) if isinstance(value, dict) else value
        for key, value in split.items()
    }
    assert allocate_shares(**turned) == shares  # to the last bit


@many
@given(splits(), st.data())
def test_what_is_spread_sums_to_one_and_takes_from_layers_above_their_use_alone(split, data):
    shares, costs = allocate_shares(**split), split["costs"]
    usable = data.draw(st.dictionaries(st.sampled_from(list(costs)), st.floats(0, 1)))
    spread = spread_excess(shares, usable, costs)
    assert math.fsum(spread.values()) == pytest.approx(1, abs=1e-9)
    able = [name for name, share in shares.items() if share <= usable.get(name, 1)]
    for name, share in spread.items():
        assert share >= min(shares[name], usable.get(name, 1))
        assert not able or name in able or share == usable[name]


@many
@given(splits(), SCORES, st.sampled_from(["missing", "zero", "equal"]))
def test_scores_that_say_nothing_give_the_split_that_layers_hold(split, score, kind):
    value = {"missing": None, "zero": 0.0, "equal": score}[kind]
    scores = {} if value is None else dict.fromkeys(split["costs"], value)
    shares = allocate_shares(**(split | {"scores": scores}))
    held = {name: cost * split["held"][name] for name, cost in split["costs"].items()}
    assert shares == pytest.approx(uniform(held), rel=1e-12)


@many
@given(splits(scores=st.floats(0.01, 100)), st.floats(0.01, 100))
def test_the_unit_of_the_scores_does_not_matter(split, unit):
    scaled = {name: unit * score for name, score in split["scores"].items()}
    shares = allocate_shares(**(split | {"scores": scaled}))
    assert shares == pytest.approx(allocate_shares(**split), rel=1e-6, abs=1e-9)


@many
@given(splits(scores=st.floats(0.01, 100), all_scored=True))
def test_of_two_layers_with_equal_gains_the_higher_score_gets_more_per_parameter(split):
    assume(is_informative(split["scores"]))
    shares = allocate_shares(**(split | {"gains": {}}))
    by_score = sorted(split["costs"], key=lambda name: split["scores"][name])
    worth = [shares[name] / split["costs"][name] for name in by_score]
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(worth))


@many
@given(st.dictionaries(st.text(max_size=3), SCORES), st.lists(st.text(max_size=3)))
def test_every_layer_weight_lies_within_half_and_double(scores, names):
    weights = allocate_layer_weights(scores, names)
    assert weights.keys() == set(names)
    assert all(0.5 <= weight <= 2 for weight in weights.values())
    turned = allocate_layer_weights(reversed_dict(scores), names[::-1])
    assert turned == weights
