"""The assessor: a metric's scores once batches agreed, nothing before."""

import pytest
import torch

from dynlora.importance import ImportanceMetric, LayerImportanceAssessor, build_metric
from dynlora.importance.signal import SignalMetric
from dynlora.importance.uniform import UniformMetric
from dynlora.types import BasisChange, LoraLayer
from tests.lora_layers import layers_of, lora_chain, set_gradients

METRICS = [
    "signal",
    "sensitivity",
    "gradient_norm",
    "fisher",
    "spectral",
    "activation_ratio",
    "magnitude",
    "attention_entropy",
    "uniform",
    "random",
]


def learn(assessor, layers, steps, *, agreeing=True):
    for step in range(steps):
        for layer in layers:
            for weight in (layer.lora_A, layer.lora_B):
                weight.grad = torch.full_like(weight, 1.0 if agreeing else (-1.0) ** step)
        assessor.observe(layers)


@pytest.fixture
def layers():
    return layers_of(lora_chain(12, 8, 6))


def test_there_are_no_scores_before_batches_agreed(layers):
    assessor = LayerImportanceAssessor(UniformMetric())
    assert assessor.scores(layers, {}) == {}
    learn(assessor, layers, 3)
    assert assessor.scores(layers, {}) == {}


def test_after_agreement_the_scores_are_the_metrics_own(layers):
    assessor, metric = LayerImportanceAssessor(SignalMetric()), SignalMetric()
    learn(assessor, layers, 20)
    for _ in range(20):
        metric.observe(layers)  # the gradient was the same in every step
    scores = assessor.scores(layers, {})
    assert scores == {
        name: pytest.approx(score) for name, score in metric.scores(layers, {}).items()
    }


def test_agreement_once_shown_stays_shown(layers):
    assessor = LayerImportanceAssessor(UniformMetric())
    learn(assessor, layers, 20)
    assert assessor.scores(layers, {})
    shown = assessor.agreement
    learn(assessor, layers, 60, agreeing=False)
    assert assessor.agreement == shown
    assert assessor.scores(layers, {}) == {"0": 1.0, "1": 1.0}


def test_alternating_gradients_never_score(layers):
    assessor = LayerImportanceAssessor(UniformMetric())
    learn(assessor, layers, 40, agreeing=False)
    assert assessor.scores(layers, {}) == {}


@pytest.mark.parametrize("name", METRICS)
def test_a_restored_assessor_continues_as_the_saved_one(layers, name):
    saved = LayerImportanceAssessor(build_metric(name, seed=0))
    restored = LayerImportanceAssessor(build_metric(name, seed=0))
    learn(saved, layers, 10)
    saved.scores(layers, {})
    restored.load_state_dict(saved.state_dict())
    assert restored.agreement == saved.agreement
    set_gradients(layers, seed=0)
    for assessor in (saved, restored):
        assessor.observe(layers)
    assert restored.agreement == saved.agreement
    assert restored.scores(layers, {}) == saved.scores(layers, {})
    counts = saved.directions(layers)
    assert restored.directions(layers) == counts
    assert set(counts) == {"0", "1"}
    assert all(count > 1.01 for count in counts.values())


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_scores_what_it_has_seen_before_and_after_a_change_of_rank(layers, name):
    metric = build_metric(name, seed=0)
    assert isinstance(metric, ImportanceMetric)
    assert all(isinstance(layer, LoraLayer) for layer in layers)
    learn(metric, layers, 3)
    before = metric.scores(layers, {})
    eye = torch.eye(4, dtype=torch.float64)
    for layer in layers:
        metric.rebase(BasisChange(name=layer.name, to_A=eye, to_B=eye))
    learn(metric, layers, 1)
    after = metric.scores(layers, {})
    # These two are shown what they score by the forwards of a whole model.
    unseen = name in ("activation_ratio", "attention_entropy")
    expected = set() if unseen else {"0", "1"}
    assert set(before) == set(after) == expected
    assert all(score > 0 for score in [*before.values(), *after.values()])


def broken(layer, factor):
    getattr(layer, factor).grad[0, 0] = float("nan" if factor == "lora_A" else "inf")


READING_GRADIENTS = ["signal", "sensitivity", "gradient_norm", "fisher", "spectral"]


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("name", READING_GRADIENTS)
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_layer(layers, name, factor):
    shown, spared = build_metric(name, seed=0), build_metric(name, seed=0)
    for step in range(6):
        set_gradients(layers, seed=step)
        if step == 3:
            spared.observe(layers[1:])
            broken(layers[0], factor)
        else:
            spared.observe(layers)
        shown.observe(layers)
    ours, theirs = shown.state_dict(), spared.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", READING_GRADIENTS)
def test_a_layer_whose_gradients_never_were_finite_is_left_out(layers, name):
    metric = build_metric(name, seed=0)
    for step in range(3):
        set_gradients(layers, seed=step)
        broken(layers[1], "lora_B")
        metric.observe(layers)
    assert set(metric.scores(layers, {})) == {"0"}
    set_gradients(layers, seed=9)
    metric.observe(layers)
    assert set(metric.scores(layers, {})) == {"0", "1"}
