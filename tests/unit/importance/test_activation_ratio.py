"""`activation_ratio`: the adapter's output over the layer's, by the layer's own forward."""

import pytest
import torch

from dynlora.importance.activation_ratio import ActivationRatioMetric
from dynlora.types import FeatureStats
from tests.lora_layers import layers_of, lora_chain, one_layer, stats_of


def test_the_score_is_the_ratio_of_what_the_adapter_adds_to_the_whole_output():
    layer = one_layer()
    tokens = torch.randn(30, 12)
    inputs = tokens.double()
    with torch.no_grad():
        whole = layer.module(inputs)
        added = whole - layer.module.get_base_layer()(inputs)
    expected = float(added.norm() / whole.norm())
    scores = ActivationRatioMetric().scores([layer], {layer.name: stats_of(layer, tokens)})
    assert scores == {layer.name: pytest.approx(expected, rel=1e-5)}


def test_an_adapter_that_adds_nothing_scores_zero():
    layer = one_layer()
    layer.lora_B.data.zero_()
    features = {layer.name: stats_of(layer, torch.randn(30, 12))}
    assert ActivationRatioMetric().scores([layer], features) == {layer.name: 0.0}


def test_a_layer_whose_input_or_output_was_never_seen_is_left_out():
    seen, unseen, silent = layers_of(lora_chain(8, 8, 8, 8))
    tokens = torch.randn(5, 8)
    features = {
        seen.name: stats_of(seen, tokens),
        silent.name: FeatureStats(tokens=tokens, variance=1.0, effective_rank=5.0, output_power=0),
    }
    scores = ActivationRatioMetric().scores([seen, unseen, silent], features)
    assert set(scores) == {seen.name}
