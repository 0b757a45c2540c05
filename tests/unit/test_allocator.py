"""Shares, layer weights and gains against numbers worked out by hand."""

import pytest
import torch

from dynlora import DynamicLoraConfig
from dynlora.allocator import allocate, allocate_layer_weights, allocate_shares, feature_gains
from dynlora.types import Assessment, FeatureStats, is_informative
from tests.unit.test_adjuster import Shape

COSTS = {"small": 10, "large": 30}
HELD = {"small": 9, "large": 2}


def shares_of(scores, costs=COSTS, **settings):
    given = {"held": dict.fromkeys(costs, 4), "gains": {}} | settings
    return allocate_shares(scores, costs, **given)


@pytest.mark.parametrize(
    ("settings", "small", "large"),
    [
        ({}, 20 / 50, 30 / 50),  # cost times score
        ({"temperature": 0.5}, 40 / 70, 30 / 70),
        ({"uniform_mix": 0.25}, 0.25 * 0.25 + 0.75 * 0.4, 0.25 * 0.75 + 0.75 * 0.6),
        ({"gains": {"large": 3.0}}, 20 / 110, 90 / 110),
    ],
)
def test_a_share_is_cost_times_sharpened_score_mixed_with_uniform(settings, small, large):
    shares = shares_of({"small": 2.0, "large": 1.0}, **settings)
    assert shares == pytest.approx({"small": small, "large": large})


def test_a_layer_without_a_score_counts_as_average_and_one_of_score_zero_as_nothing():
    shares = shares_of({"a": 1.0, "b": 3.0}, {"a": 1, "b": 1, "c": 1})
    assert shares == pytest.approx({"a": 1 / 6, "b": 3 / 6, "c": 2 / 6})
    shares = shares_of({"small": 0.0, "large": 1.0}, uniform_mix=0.4)
    assert shares == pytest.approx({"small": 0.1, "large": 0.9})


def test_scores_of_layers_whose_inputs_never_vary_give_each_layer_the_share_that_it_holds():
    shares = shares_of({"small": 2.0, "large": 1.0}, held=HELD, gains=dict.fromkeys(COSTS, 0.0))
    assert shares == {"small": 90 / 150, "large": 60 / 150}


def test_a_difference_of_float_rounding_is_no_information():
    assert not is_informative({"a": 1.0, "b": 1.0 + 1e-12})
    assert is_informative({"a": 1.0, "b": 1.0 + 1e-6})


@pytest.mark.parametrize(
    ("scores", "weights"),
    [
        ({"a": 0.8, "b": 1.2}, [0.8, 1.2, 1.0]),  # over the mean score; unscored counts as average
        ({"a": 0.1, "b": 9.0}, [0.5, 18 / 9.1, 1.0]),
        ({"a": 0.0, "b": 0.1, "c": 9.0}, [0.5, 0.5, 2.0]),
        ({}, [1.0, 1.0, 1.0]),
        ({"a": 0.0, "b": 0.0}, [1.0, 1.0, 1.0]),
        ({"a": 2.0, "b": 2.0}, [1.0, 1.0, 1.0]),
    ],
)
def test_a_layer_weight_is_the_score_over_the_mean_clamped_to_half_and_double(scores, weights):
    found = allocate_layer_weights(scores, ["a", "b", "c"])
    assert list(found.values()) == pytest.approx(weights)


def test_a_gain_is_the_figure_over_its_mean_to_a_power():
    assert feature_gains({"a": 9.0, "b": 3.0, "c": 6.0}, 1.0) == {"a": 1.5, "b": 0.5, "c": 1.0}
    gains = feature_gains({"a": 9.0, "b": 3.0, "c": 6.0}, 0.5)
    assert gains == pytest.approx({"a": 1.5**0.5, "b": 0.5**0.5, "c": 1.0})
    assert feature_gains({"a": 0.0, "b": 0.0}, 1.0) == {}
    assert feature_gains({"a": 0.0, "b": 2.0}, 1.0) == {"a": 0.0, "b": 2.0}


@pytest.mark.parametrize("feature", ["effective_rank", "variance"])
def test_shares_follow_scores_and_the_chosen_feature_and_skip_layers_without_gradients(feature):
    costs = {"poor": 10, "rich": 30, "unreached": 10}
    layers = [Shape(name, cost=cost) for name, cost in costs.items()]
    assessed = Assessment(scores={"poor": 2.0, "rich": 1.0}, directions={}, unreached={"unreached"})
    figures = {"poor": 1.0, "rich": 3.0}
    features = {
        name: FeatureStats(
            tokens=torch.zeros(4, 4),
            output_power=1.0,
            **{"variance": 1.0, "effective_rank": 1.0, feature: figure},
        )
        for name, figure in figures.items()
    }
    config = DynamicLoraConfig(
        feature=feature, feature_weight=1.0, temperature=0.5, uniform_mix=0.2
    )
    shares = allocate(assessed, layers, features, config)
    # Gains are 1/2 and 3/2, so that worth is 10 * (2 * 1/2)² and 30 * (1 * 3/2)².
    expected = {"poor": 0.2 * 10 / 40 + 0.8 * 10 / 77.5, "rich": 0.2 * 30 / 40 + 0.8 * 67.5 / 77.5}
    assert shares == pytest.approx(expected | {"unreached": 0.0})
