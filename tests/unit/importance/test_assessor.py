"""The assessor: a metric's scores once batches agreed, nothing before."""

from functools import partial

import pytest
import torch

from dynlora.config import METRICS
from dynlora.errors import ConfigError, NonFiniteError
from dynlora.importance import build_metric
from dynlora.importance.assessor import LayerImportanceAssessor
from dynlora.importance.controls import UniformMetric
from dynlora.importance.signal import SignalMetric
from tests.lora_layers import layers_of, lora_chain, set_gradients


def learn(observe, layers, steps, *, agreeing=True):
    for step in range(steps):
        for layer in layers:
            for weight in (layer.lora_A, layer.lora_B):
                weight.grad = torch.full_like(weight, 1.0 if agreeing else (-1.0) ** step)
        observe(layers)


def assessor_of(layers, metric=None, **given):
    device = torch.device("cpu")
    assessor = LayerImportanceAssessor(metric or UniformMetric(), layers, device=device, **given)
    return assessor, partial(assessor.observe, step=1)


def scores_of(assessor):
    return assessor.assess({}, step=1).scores


@pytest.fixture
def layers():
    return layers_of(lora_chain(12, 8, 6))


def test_scores_begin_with_agreement_and_are_the_metrics_own(layers):
    assessor, observe = assessor_of(layers, SignalMetric())
    assert scores_of(assessor) == {}
    learn(observe, layers, 3)
    assert scores_of(assessor) == {}
    learn(observe, layers, 17)
    metric = SignalMetric()
    metric.observe(layers)  # the gradient was the same in every step
    assert scores_of(assessor) == pytest.approx(metric.scores(layers, {}))


def test_agreement_once_shown_stays_shown(layers):
    assessor, observe = assessor_of(layers)
    learn(observe, layers, 20)
    assert scores_of(assessor)
    shown = assessor.agreement
    learn(observe, layers, 60, agreeing=False)
    assert assessor.agreement == shown
    assert scores_of(assessor) == {"0": 1.0, "1": 1.0}


@pytest.mark.parametrize("name", METRICS)
def test_a_restored_assessor_continues_as_the_saved_one(layers, name):
    saved, observe = assessor_of(layers, build_metric(name, seed=0))
    restored, _ = assessor_of(layers, build_metric(name, seed=0))
    learn(observe, layers, 10)
    scores_of(saved)
    restored.load_state_dict(saved.state_dict(), skipped={"1": 2}, unreached={"0"})
    assert restored.agreement == saved.agreement
    assert (restored.skipped(), restored.unreached()) == ({"1": 2}, {"0"})
    set_gradients(layers, seed=0)
    for assessor in (saved, restored):
        assessor.observe(layers, step=11)
    assert restored.agreement == saved.agreement
    assert restored.assess({}, step=11) == saved.assess({}, step=11)
    assert all(count > 1.01 for count in saved.directions().values())


@pytest.mark.parametrize("stops", [False, True])
def test_gradients_that_are_not_finite_are_counted_by_layer_or_stop_the_run(layers, stops):
    assessor, observe = assessor_of(layers, stops=stops)
    set_gradients(layers, seed=0)
    observe(layers)
    broken(layers[1], "lora_B")
    if stops:
        with pytest.raises(NonFiniteError, match=r"gradient of '1'.* at step 1 \(in 1 of 2"):
            observe(layers)
        return
    observe(layers)
    observe(layers[1:])
    assert assessor.skipped() == assessor.skipped() == {"1": 2}
    assessor.skipped().update(["0"])  # a copy
    assert assessor.skipped() == {"1": 2}


@pytest.mark.parametrize("stops", [False, True])
def test_scores_that_are_not_finite_are_left_out_and_counted_or_stop_the_run(layers, stops):
    class Broken(UniformMetric):
        def scores(self, layers, features):
            return {"0": 1.0, "1": float("nan")}

    assessor, observe = assessor_of(layers, Broken(), stops=stops)
    learn(observe, layers, 20)
    if stops:
        with pytest.raises(NonFiniteError, match="score of '1' must be finite"):
            scores_of(assessor)
        return
    assert scores_of(assessor) == {"0": 1.0}
    assert assessor.skipped() == {"1": 1}


@pytest.mark.parametrize("wrong", [{"0": 1.0, "1": -3.0}, {"0": 1.0, "1": 1.0, "2": 1.0}])
def test_scores_below_zero_or_of_other_layers_are_refused(layers, wrong):
    class Wrong(UniformMetric):
        def scores(self, layers, features):
            return wrong

    assessor, observe = assessor_of(layers, Wrong())
    learn(observe, layers, 20)
    name, score = list(wrong.items())[-1]
    with pytest.raises(ConfigError, match=rf"at 0 or above, got {score} for '{name}'"):
        scores_of(assessor)


def test_layers_without_a_gradient_so_far_are_unreached_and_have_no_score(layers):
    assessor, observe = assessor_of(layers)
    learn(observe, layers[1:], 20)
    assessed = assessor.assess({}, step=20)
    assert (assessed.scores, assessed.unreached) == ({"1": 1.0}, {"0"})
    learn(observe, layers, 1)
    assert assessor.unreached() == set()


def broken(layer, factor):
    getattr(layer, factor).grad[0, 0] = float("nan" if factor == "lora_A" else "inf")


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("name", METRICS)
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


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_of_gradients_leaves_out_a_layer_without_finite_ones(layers, name):
    metric = build_metric(name, seed=0)
    unseen = set(metric.scores(layers, {}))  # of metrics that need no gradient
    for step in range(3):
        set_gradients(layers, seed=step)
        broken(layers[1], "lora_B")
        metric.observe(layers)
    shown = set(metric.scores(layers, {}))
    set_gradients(layers, seed=9)
    metric.observe(layers)
    assert (shown, set(metric.scores(layers, {}))) in [({"0"}, {"0", "1"}), (unseen, unseen)]
