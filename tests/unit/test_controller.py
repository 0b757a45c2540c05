"""The controller: its two calls, plans of one's own, state, and everything that it refuses."""

import copy
import gc
import json
import math
import re
import weakref
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, VeloraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim import SGD, Adafactor, Adagrad, AdamW

from dynlora import DynamicLora, DynamicLoraConfig, RankPlan
from dynlora.adapters.layers import find_lora_layers
from dynlora.adapters.peft_config import ShapeHooks
from dynlora.errors import (
    BudgetError,
    ConfigError,
    EngineError,
    LayerError,
    NonFiniteError,
    OptimizerError,
    ResumeError,
)
from dynlora.history import is_scored
from tests.lora_layers import lora_chain, set_gradients
from tests.models import adamw, attached, bare_llama, lora_llama, loss_of, sequences, train, trained

MOVING = {"total_steps": 40, "hysteresis": 0.0, "shrink_tolerance": 1.0}


def on_chain(*widths, chain=None, **config):
    """Return a model of linear layers, its optimizer and a controller on it."""
    model = lora_chain(*(widths or (8, 10, 6, 12)), **(chain or {}))
    optimizer = adamw(model)
    return model, optimizer, attached(model, optimizer, **config)


def moved(dynamic):
    return [
        name
        for event in dynamic.history
        for name, layer in event.layers.items()
        if layer.rank_before != layer.rank_after
    ]


def test_an_optimizer_that_takes_the_place_of_the_one_given_is_refused_at_the_next_event():
    model = lora_llama().train()
    dynamic = attached(model, adamw(model), total_steps=40)
    train(model, dynamic._adapters._optimizer, dynamic, 5)
    other = adamw(model, fused=True)
    with pytest.raises(OptimizerError, match="got weights that another has changed"):
        train(model, other, dynamic, 35)
    assert dynamic._step == dynamic._timetable.events[0]
    state = dynamic.state_dict()
    follower = attached(model, other, total_steps=40)
    follower.load_state_dict(state)
    train(model, other, follower, 20)
    assert len(follower.history) == 4


@pytest.mark.parametrize("broken", [False, True])
def test_a_loop_whose_gradients_nobody_can_read_is_warned(tiny_llama, caplog, broken):
    dynamic = attached(tiny_llama, adamw(tiny_llama), total_steps=20)
    if not broken:
        dynamic.observe = lambda: None
    weight, no_step = math.nan if broken else 1.0, SGD([torch.zeros(1)])
    train(tiny_llama, no_step, dynamic, 20, loss=lambda *given: weight * loss_of(*given))
    assert dynamic.history[-1].step == 12, "an optimizer that takes no step is no other"
    (told,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "no two gradients were compared" in told.getMessage()


def test_a_warning_says_why_no_rank_moved_once_there_is_no_event_left(tiny_llama, caplog):
    _, dynamic = trained(tiny_llama, 40, **MOVING | {"hysteresis": 1e9})
    assert len(dynamic.history) == 5
    (told,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert told.getMessage().startswith("no rank moved in 5 events: ")


def test_ranks_that_are_uniform_on_purpose_are_no_reason_to_warn(tiny_llama, caplog):
    trained(tiny_llama, 40, importance="uniform", **MOVING)
    assert not caplog.records


def test_events_stay_within_the_configured_bounds(tiny_llama, caplog):
    caplog.set_level("INFO", logger="dynlora")
    _, dynamic = trained(tiny_llama, 40, importance="random", min_rank=3, max_rank=6, **MOVING)
    assert "no rank moved" not in caplog.text
    after = {x.rank_after for event in dynamic.history for x in event.layers.values()}
    assert (min(after), max(after)) == (3, 6)
    assert all(x.variance > 0 and x.directions >= 1 for x in dynamic.history[-1].layers.values())


def test_a_model_that_is_called_past_its_hooks_gets_one_warning_where_ranks_may_move(
    tiny_llama, caplog
):
    optimizer = adamw(tiny_llama)
    dynamic = attached(tiny_llama, optimizer, **MOVING)
    inner = tiny_llama.get_base_model()  # the controller was given the PEFT model around it
    train(inner, optimizer, dynamic, 20)
    assert moved(dynamic)
    scored = [e.step for e in dynamic.history if any(f.score for f in e.layers.values())]
    told = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert len(scored) > 1
    (message,) = told
    assert message.startswith(f"no input of any of 14 layers was seen up to step {scored[0]}: ")


def test_layer_weights_follow_importance_without_a_change_of_function_and_do_not_multiply(
    tiny_llama,
):
    optimizer, scales = adamw(tiny_llama), set()
    for seed in range(3):  # of runs one after another
        settings = {"importance": "random", "layer_weights": True, "pinned": ("*",), "seed": seed}
        dynamic = attached(tiny_llama, optimizer, **settings, **MOVING)
        batches = sequences()
        train(tiny_llama, optimizer, dynamic, 19, batches=batches)
        tokens = next(batches)
        loss_of(tiny_llama, tokens).backward()
        dynamic.observe()
        optimizer.step()
        before = tiny_llama(input_ids=tokens).logits.detach()
        dynamic.step()
        torch.testing.assert_close(tiny_llama(input_ids=tokens).logits, before, rtol=0, atol=1e-5)
        dynamic.close()
        event = dynamic.history[-1]
        mean = sum(layer.score for layer in event.layers.values()) / len(event.layers)
        for layer in find_lora_layers(tiny_llama, None):
            logged = event.layers[layer.name]
            weight = min(max(logged.score / mean, 0.5), 2.0)
            assert logged.weight == pytest.approx(weight, rel=1e-6)
            assert layer.scaling == pytest.approx(2.0 * weight, rel=1e-6)
            scales.add(layer.scaling)
        assert not moved(dynamic)
    assert len(scales) > 14


def test_after_an_event_inputs_are_sampled_anew():
    model, _, dynamic = on_chain(total_steps=40)
    model.train()(torch.randn(5, 8, dtype=torch.float64))
    dynamic.apply(RankPlan(step=0, ranks={"0": 3}))
    tokens = torch.randn(6, 8, dtype=torch.float64)
    model(tokens)
    kept = dynamic.state_dict()["features"]["0/tokens"]
    torch.testing.assert_close(kept.sort(dim=0).values, tokens.float().sort(dim=0).values)


def hooks_of(model):
    """Count hooks, and forwards that are not their class's."""
    return sum(
        len(module._forward_hooks)
        + len(module._forward_pre_hooks)
        + len(module._backward_hooks)
        + len(module._load_state_dict_pre_hooks)
        + ("forward" in vars(module))
        for module in model.modules()
    )


def test_closed_or_after_the_last_event_it_holds_without_a_hook_and_books_no_time(tiny_llama):
    before, optimizer = hooks_of(tiny_llama), adamw(tiny_llama)
    for steps in (8, 16):  # after each, inputs are sampled in the step to come
        dynamic = attached(tiny_llama, optimizer, fused=False, **MOVING)
        train(tiny_llama, optimizer, dynamic, steps)
        assert hooks_of(tiny_llama) > before
        gradients = [k for k in dynamic.state_dict()["importance"] if k.startswith("gradients/")]
        assert gradients
        if steps == 8:
            dynamic.close()
        else:
            train(tiny_llama, optimizer, dynamic, 4)
            assert not dynamic.state_dict()["importance"].keys() & gradients
        assert hooks_of(tiny_llama) == before
        booked, ranks, events = dynamic.seconds, dynamic.ranks, len(dynamic.history)
        assert booked > 0
        dynamic.observe()  # no gradient is asked for any more
        dynamic.step()
        train(tiny_llama, optimizer, dynamic, 30)
        assert (dynamic.seconds, dynamic.ranks, len(dynamic.history)) == (booked, ranks, events)


def test_closed_before_an_event_it_leaves_nothing_on_the_optimizer():
    model, optimizer, dynamic = on_chain(8, 8, 8)
    tokens = torch.randn(4, 8, dtype=torch.float64)
    while not optimizer._optimizer_step_post_hooks:
        model(tokens).square().sum().backward()
        dynamic.observe()
        if not optimizer._optimizer_step_post_hooks:
            optimizer.step()
            dynamic.step()
    dynamic.close()
    assert not optimizer._optimizer_step_post_hooks


def test_once_ranks_hold_the_model_keeps_no_optimizer_alive():
    model, optimizer, dynamic = on_chain()
    dynamic.freeze()
    alive = weakref.ref(optimizer)
    del optimizer, dynamic
    gc.collect()
    assert alive() is None
    model.load_state_dict(model.state_dict())


def test_a_plan_of_ones_own_gives_its_ranks_and_is_recorded():
    _, _, dynamic = on_chain()
    event = dynamic.apply(RankPlan(step=7, ranks={"0": 1, "2": 6}))
    assert dynamic.ranks == {"0": 1, "1": 4, "2": 6}
    assert dynamic.history == [event]
    assert (event.step, event.parameters) == (7, 18 + 4 * 16 + 6 * 18)
    assert event.layers["0"].rank_before == 4
    assert event.layers["0"].rank_after == 1
    assert event.layers["0"].output_lost > 0
    assert event.layers["1"].output_lost == 0
    assert event.layers["0"].score is None


def test_rows_of_a_second_plan_in_the_same_step_differ_from_the_first_ones():
    _, _, dynamic = on_chain()
    dynamic.apply(RankPlan(step=0, ranks={"0": 1, "1": 1, "2": 1}))
    for rank in (3, 5):
        dynamic.apply(RankPlan(step=0, ranks={"0": rank}))
    [first, *_] = dynamic._layers
    assert torch.linalg.matrix_rank(first.lora_A) == 5


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"0": 1, "1": 8}, "budget of 128 parameters, got 144"),
        ({"0": 3, "lm_head": 2}, "layers of this model, got 'lm_head'"),
        *[
            ({"1": rank}, f"rank of '1' must be .* at least 1, got {re.escape(repr(rank))}")
            for rank in (0, -2, 2.0, True, "2", None)
        ],
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing(ranks, message):
    _, _, dynamic = on_chain(8, 8, 8)
    plan = RankPlan(step=0, ranks={})
    object.__setattr__(plan, "ranks", ranks)  # the tests' type checker refuses some of these
    with pytest.raises(BudgetError, match=message):
        dynamic.apply(plan)
    assert dynamic.ranks == {"0": 4, "1": 4}
    assert dynamic.history == []
    dynamic.apply(RankPlan(step=0, ranks={"0": 1, "1": 7}))  # exactly the budget


@pytest.mark.parametrize(("reaction", "observed"), [("skip", 24), ("stop", 40)])
def test_before_a_far_event_only_some_steps_are_observed_unless_each_could_stop_the_run(
    reaction, observed
):
    window = {"total_steps": 130, "first_event": 1.0, "last_event": 1.0, "events": 1}
    _, _, dynamic = on_chain(on_nonfinite=reaction, **window)
    read = []
    dynamic._assessor.observe = lambda layers, *, step: read.append(step)
    for _ in range(40):
        set_gradients(dynamic._layers, seed=0)
        dynamic.observe()
        dynamic.step()
    assert len(read) == observed


@pytest.mark.parametrize(
    ("noisy", "steps"), [(0, [2, 4, 7, 10, 12, 14]), (8, [2, 4, 7, 10, 12, 14, 17, 20, 22])]
)
def test_gradients_that_agree_late_move_ranks_late_and_a_resume_goes_on_with_it(noisy, steps):
    window = {**MOVING, "first_event": 0.05, "last_event": 0.3}
    model, _, dynamic = on_chain(**window)
    for step in range(40):
        set_gradients(dynamic._layers, seed=step if step < noisy else 0)
        dynamic.observe()
        dynamic.step()
        if step == 10:
            state = dynamic.state_dict()
            dynamic = attached(model, adamw(model), **window)
            dynamic.load_state_dict(state)
    assert [event.step for event in dynamic.history] == steps
    assert sum(map(is_scored, dynamic.history)) == 3
    assert dynamic._frozen


def test_observing_without_any_gradient_is_refused_with_the_order_of_calls():
    model, _, dynamic = on_chain()
    model.zero_grad()
    with pytest.raises(LayerError, match=r"one of 3 LoRA layers .* got none: .* after `loss\.back"):
        dynamic.observe()


def test_a_step_that_reaches_only_what_else_is_trained_is_left_out(tiny_llama):
    # As a batch of texts alone, where the adapter is on the part that reads images.
    norm = tiny_llama.base_model.model.model.norm.weight.requires_grad_()
    optimizer = adamw(tiny_llama)
    dynamic = attached(tiny_llama, optimizer, importance="random", **MOVING)
    train(tiny_llama, optimizer, dynamic, 1, loss=lambda *_: norm.square().sum())
    assert not dynamic.skipped
    train(tiny_llama, optimizer, dynamic, 39)
    assert moved(dynamic)


@pytest.mark.parametrize("reaction", ["skip", "stop"])
def test_an_event_on_broken_weights_ends_the_run_with_the_layers_name(reaction):
    _, _, dynamic = on_chain(total_steps=1, on_nonfinite=reaction)
    dynamic._layers[1].lora_B.data[0, 0] = float("nan")
    message = r"weights of '1' must be finite, got NaN or infinity at step 1 \(in 1 of 3 layers\)"
    with pytest.raises(NonFiniteError, match=message):
        dynamic.step()
    with pytest.raises(NonFiniteError, match="weights of '1'"):
        dynamic.apply(RankPlan(step=1, ranks={"1": 2}))


def test_a_run_goes_on_from_its_saved_adapter_with_the_budget_and_highest_rank_it_began_with(
    tmp_path,
):
    config = {"importance": "random", **MOVING}
    model = lora_llama(r=1, rank_pattern={"q_proj": 12, "k_proj": 3})
    optimizer, dynamic = trained(model, 10, **config)
    assert max(dynamic.ranks.values()) < 12, "a new run would hold no rank above 8"
    assert dynamic.parameters < dynamic.budget, "a new run would have what is held as its budget"
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy([part.state_dict() for part in (dynamic, model, optimizer)])
    train(model, optimizer, dynamic, 20)

    again = PeftModel.from_pretrained(bare_llama(), tmp_path, is_trainable=True)
    optimizer_again = adamw(again)
    resumed = attached(again, optimizer_again, **config)
    for part, state in zip((resumed, again, optimizer_again), saved, strict=True):
        part.load_state_dict(state)
    train(again, optimizer_again, resumed, 20)

    assert resumed.budget == dynamic.budget
    assert resumed.state_dict()["max_rank"] == 12
    assert resumed.history == dynamic.history
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("importance", ["signal", "sensitivity"])
def test_a_state_stays_what_it_was_while_the_run_goes_on(importance):
    model = lora_llama().train()
    optimizer, dynamic = trained(model, 10, importance=importance, total_steps=40)
    state = dynamic.state_dict()
    tensors = {k: state[k] for k in ("importance", "features")}
    before = copy.deepcopy(tensors)
    train(model, optimizer, dynamic, 3)
    for part, values in tensors.items():
        for name, value in values.items():
            assert torch.equal(value, before[part][name]), (part, name)


def test_the_state_survives_json_with_equal_figures():
    _, _, dynamic = on_chain(total_steps=40)
    set_gradients(dynamic._layers, seed=0)
    dynamic._layers[1].lora_B.grad[0, 0] = math.nan
    dynamic.observe()
    dynamic.apply(RankPlan(step=1, ranks={"0": 1, "2": 6}))
    state = dynamic.state_dict()
    plain = {key: state[key] for key in state if key not in ("importance", "features")}
    _, _, other = on_chain(total_steps=40)
    other.load_state_dict(state | json.loads(json.dumps(plain)))
    assert other.ranks == {"0": 1, "1": 4, "2": 6}
    assert other.history == dynamic.history
    assert other.peak_parameters == dynamic.peak_parameters
    assert other.seconds == dynamic.seconds > 0
    assert other.skipped == dynamic.skipped == Counter({"1": 1})
    assert other.state_dict().keys() == state.keys()


def test_a_run_frozen_by_hand_holds_its_ranks_also_when_restored(tiny_llama):
    optimizer, dynamic = trained(tiny_llama, 7, importance="random", fused=False, **MOVING)
    dynamic.freeze()
    state, ranks, hooks = dynamic.state_dict(), dynamic.ranks, hooks_of(tiny_llama)
    train(tiny_llama, optimizer, dynamic, 33)
    resumed = attached(tiny_llama, optimizer, importance="random", fused=False, **MOVING)
    resumed.load_state_dict(state)
    assert hooks_of(tiny_llama) == hooks
    train(tiny_llama, optimizer, resumed, 33)
    for run in (dynamic, resumed):
        assert run.ranks == ranks
        assert [event.step for event in run.history] == [6]


def test_a_finished_run_set_back_to_an_earlier_state_moves_ranks_again(tiny_llama):
    settings = {"importance": "random", "fused": False, **MOVING}
    optimizer, dynamic = trained(tiny_llama, 8, **settings)
    before = hooks_of(tiny_llama)
    parts = (dynamic, tiny_llama, optimizer)
    early = copy.deepcopy([part.state_dict() for part in parts])
    train(tiny_llama, optimizer, dynamic, 32)
    history = dynamic.history
    for part, state in zip(parts, early, strict=True):
        part.load_state_dict(state)
    assert hooks_of(tiny_llama) == before
    train(tiny_llama, optimizer, dynamic, 32)
    assert [event.step for event in dynamic.history] == [event.step for event in history]
    assert moved(dynamic)


def moved_twice(model, optimizer, **config):
    """Return a controller whose ranks moved twice, and states and outputs from in between."""
    dynamic = attached(model, optimizer, **config)
    first, second, *_ = dynamic.ranks
    dynamic.apply(RankPlan(step=0, ranks={first: 2, second: 5}))
    train(model, optimizer, dynamic, 1)
    early = dynamic.state_dict(), copy.deepcopy(model.state_dict())
    logits = model(input_ids=next(sequences(batch=2))).logits
    dynamic.apply(RankPlan(step=1, ranks={first: 5, second: 2}))
    train(model, optimizer, dynamic, 2)
    return dynamic, *early, logits


@pytest.mark.parametrize(
    ("importance", "observed", "way"),
    [
        ("signal", True, "hooks"),  # of the Trainer callback
        ("signal", False, "take_shapes"),
        ("sensitivity", False, "take_shapes"),
    ],
)
def test_weights_of_other_ranks_put_back_are_saved_with_their_ranks_and_train_on(
    importance, observed, way, tmp_path
):
    model = lora_llama()
    optimizer = adamw(model)
    dynamic, state, weights, logits = moved_twice(model, optimizer, importance=importance, **MOVING)
    if way == "hooks":
        ShapeHooks(model, dynamic._layers)
    if way == "take_shapes":
        dynamic.take_shapes(state)
    model.load_state_dict(weights)
    first, second, *_ = dynamic.ranks
    assert (dynamic.ranks[first], dynamic.ranks[second]) == (2, 5)
    assert len(dynamic.history) == {"hooks": 2, "take_shapes": 1}[way]
    assert dynamic.state_dict()["step"] == 3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare_llama(), tmp_path)
    torch.testing.assert_close(loaded(input_ids=next(sequences(batch=2))).logits, logits)
    train(model, optimizer, dynamic, int(observed))
    dynamic.apply(RankPlan(step=3, ranks={first: 3, second: 4}))
    train(model, optimizer, dynamic, 17)
    assert dynamic.history[-1].step == dynamic._timetable.events[-1]
    assert all(math.isfinite(layer.score) for layer in dynamic.history[-1].layers.values())


def test_weights_of_other_ranks_put_back_train_on_with_a_state_that_starts_anew():
    model = lora_llama()
    optimizer = Adafactor(trainable(model), lr=1e-3)
    dynamic, state, weights, _ = moved_twice(model, optimizer, **MOVING)
    dynamic.take_shapes(state)
    model.load_state_dict(weights)
    train(model, optimizer, dynamic, 2)
    for layer in dynamic._layers:
        assert len(optimizer.state[layer.parameters[0]]["row_var"]) == layer.r


def test_of_weights_of_other_ranks_put_back_no_older_gradient_is_in_a_score():
    def scored(steps_before):
        model = lora_llama()
        dynamic = attached(model, adamw(model), total_steps=100)
        first, second, *_ = dynamic.ranks
        early = (dynamic.state_dict(), copy.deepcopy(model.state_dict()))
        dynamic.apply(RankPlan(step=0, ranks={first: 2, second: 5}))
        held_still = SGD([torch.zeros(1)])
        train(model, held_still, dynamic, steps_before, batches=sequences(seed=1))
        model.zero_grad()
        dynamic.take_shapes(early[0])
        model.load_state_dict(early[1])
        loss_of(model, next(sequences(seed=2))).backward()
        dynamic.observe()
        return dynamic._assessor._metric.scores(dynamic._layers, {})[first]

    assert scored(3) == pytest.approx(scored(0))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"min_rank": 2}, "`min_rank` was 1, now 2"),
        ({"importance": "spectral"}, "`importance` was signal, now spectral"),
        ({"pinned": ("1",)}, r"`pinned` was \(\), now \('1',\)"),
        ({"chain": {"r": 5}}, "`budget` was 128, now 160"),
        ({"widths": (4, 4, 4, 4, 4)}, "got 2 layers where the model has 4; '2' is in one"),
        (
            {"widths": (8, 8, 8, 8), "chain": {"target_modules": ["0", "2"]}},
            "got 2 layers where the model has 2; '1' is in one",
        ),
    ],
)
def test_another_run_is_refused_on_resume_with_both_values(now, message):
    _, _, dynamic = on_chain(8, 8, 8, total_steps=40)
    _, _, other = on_chain(*now.pop("widths", (8, 8, 8)), **{"total_steps": 40} | now)
    with pytest.raises(ResumeError, match=message):
        other.load_state_dict(dynamic.state_dict())


def test_a_longer_run_may_resume_and_keeps_its_events():
    _, _, dynamic = on_chain(total_steps=40)
    _, _, longer = on_chain(total_steps=400)
    longer.load_state_dict(dynamic.state_dict())
    assert longer.state_dict()["timetable"]["events"] == (6, 10, 13, 16, 20)


class Favourite:
    """A metric that scores the layers whose names contain a word."""

    def __init__(self, word, decay=0.5):
        self.word, self.decay, self.steps = word, decay, 0

    def observe(self, layers):
        self.steps += 1

    def scores(self, layers, features):
        return {layer.name: 1.0 + (self.word in layer.name) for layer in layers}

    def rebase(self, change):
        pass

    def state_dict(self):
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state):
        self.steps = int(state["steps"])


def test_a_metric_object_scores_layers_and_each_run_uses_a_copy(tiny_llama):
    metric, optimizer = Favourite("layers.1"), adamw(tiny_llama)
    dynamic = attached(tiny_llama, optimizer, importance=metric, **MOVING)
    train(tiny_llama, optimizer, dynamic, 20)
    one, other = (
        [r for n, r in dynamic.ranks.items() if f"layers.{place}" in n] for place in (1, 0)
    )
    assert sum(one) / len(one) > 4 > sum(other) / len(other)
    assert metric.steps == 0


def test_a_run_resumes_only_with_the_metric_and_the_settings_it_began_with():
    def state_of(metric):
        return on_chain(total_steps=40, importance=metric)[2]

    saved = json.loads(json.dumps(state_of(Favourite("0")).config.to_dict()))["importance"]
    path = f"{Favourite.__module__}:Favourite"
    assert saved == {"path": path, "settings": {"word": "0", "decay": 0.5}}
    state = state_of(Favourite("0")).state_dict()
    state_of(Favourite("0")).load_state_dict(state)
    for other in (Favourite("1"), "signal"):
        with pytest.raises(ResumeError, match=f"`importance` was .*{path}"):
            state_of(other).load_state_dict(state)


class Follower:
    """An extension that records its calls."""

    def __init__(self):
        self.calls, self.sampled, self.step = [], [], torch.tensor(0)

    def attach(self, host):
        self.calls.append("attach")
        self.names = [layer.name for layer in host.layers]

    def begin_step(self, step, *, sampled):
        self.step.fill_(step)
        if sampled:
            self.sampled.append(step)

    def after_event(self, order):
        order()
        self.calls.append(f"event {int(self.step) + 1}")

    def freeze(self):
        self.calls.append("freeze")

    def close(self):
        self.calls.append("close")

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.calls.append(f"load {int(state['step'])}")


def test_an_extension_follows_the_run_and_its_resume(tiny_llama):
    def run(*followers):
        config = DynamicLoraConfig(events=2, **MOVING)
        return DynamicLora(tiny_llama, optimizer, config, extensions=followers)

    optimizer, first = adamw(tiny_llama), Follower()
    dynamic = run(first)
    train(tiny_llama, optimizer, dynamic, 8)
    assert first.calls == ["attach", "event 2"]
    assert first.names == list(dynamic.ranks)
    assert first.sampled == [0, 8]
    state, second = dynamic.state_dict(), Follower()
    first.step.fill_(99)  # a saved state does not change as extensions go on
    resumed = run(second)
    resumed.load_state_dict(state)
    train(tiny_llama, optimizer, resumed, 14)
    resumed.close()
    assert first.calls[2:] == ["freeze", "close"]
    assert second.calls == [
        "attach", "close", "attach", "close", "attach", "load 8", "event 12", "event 22", "freeze",
        "freeze", "close",
    ]  # fmt: skip
    with pytest.raises(ResumeError, match=r"`extensions` was \['.*Follower'\], now \[\]"):
        run().load_state_dict(state)
    again = Follower()  # given to two controllers, as by a notebook cell that runs twice
    run(again), run(again)
    assert again.calls[-2:] == ["close", "attach"]


def test_extensions_of_one_class_are_refused_and_a_failed_one_closes_the_others():
    model, config = lora_chain(8, 8), DynamicLoraConfig()
    with pytest.raises(ConfigError, match="`extensions` must be of different classes"):
        DynamicLora(model, adamw(model), config, extensions=[Follower(), Follower()])

    class Failing(Follower):
        def attach(self, host):
            raise LayerError("no")

    first = Follower()
    with pytest.raises(LayerError, match="no"):
        DynamicLora(model, adamw(model), config, extensions=[first, Failing()])
    assert first.calls == ["attach", "close"]


def refuse(model, error, message, *, optimizer=None, **config):
    before = hooks_of(model)
    optimizer = optimizer or AdamW(trainable(model))
    with pytest.raises(error, match=message):
        DynamicLora(model, optimizer, DynamicLoraConfig(**config))
    assert hooks_of(model) == before


def wrapped(layer, **lora):
    base = nn.Sequential(nn.Linear(4, 4), layer)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"], **lora))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bare_llama, r"got a LlamaForCausalLM with none; .* Linear \(15\).*LlamaRMSNorm \(5\)"),
        (lambda: lora_llama(init_lora_weights="pissa"), "`init_lora_weights` 'pissa'"),
        (lambda: lora_llama(init_lora_weights="pissa_niter_4"), "'pissa_niter_4'"),
        (lambda: lora_llama(init_lora_weights="olora"), "`init_lora_weights` 'olora'"),
        (
            lambda: lora_llama(velora_config=VeloraConfig()),
            "q_proj' .* or DoRA, got the variant VeloraLinearVariant",
        ),
        (lambda: wrapped(nn.Conv1d(4, 4, 1)), r"'1' .*lora\.layer\.Conv1d on Conv1d"),
        (lambda: wrapped(nn.Conv3d(4, 4, 1)), r"'1' .*lora\.layer\.Conv3d on Conv3d"),
        (lambda: wrapped(nn.MultiheadAttention(4, 2)), "'1' .*MultiheadAttention on Multihead"),
    ],
)
def test_an_adapter_that_cannot_be_resized_is_refused_by_its_kind(make, message):
    refuse(make(), LayerError, message)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Adagrad(trainable(model)), r"got torch\.optim\.adagrad\.Adagrad"),
        (lambda _: adamw(lora_llama()), "all 28 LoRA parameters, got 28 that it does not"),
        (lambda model: AdamW(trainable(model)[1:]), "all 28 LoRA parameters, got 1 that it"),
    ],
)
def test_an_optimizer_that_cannot_follow_is_refused(make, message):
    model = lora_llama()
    refuse(model, OptimizerError, message, optimizer=make(model))


NARROW = {"r": 8, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}
"""Two layers of 32 + 32 with rank 2, at a budget of rank 8."""


@pytest.mark.parametrize(
    ("lora", "settings", "message"),
    [
        ({}, {"max_rank": 3}, r"got 3 where 'model\.layers\.0\.self_attn\.q_proj' holds 4"),
        ({"rank_pattern": {"up_proj": 7}}, {"max_rank": 6}, r"got 6 where '.*up_proj' holds 7"),
        ({}, {"min_rank": 5}, r"of 4096 .* 14 layers .* take 5120: .*in \[5120, 29696\]"),
        (NARROW, {"max_rank": 4}, "budget of 1024 .* hold 128 to 512"),
        ({}, {"pinned": ("*.k_proj", "q_proj")}, "got 'q_proj', which matches none of 14"),
    ],
)
def test_a_budget_or_a_pattern_that_does_not_fit_the_layers_is_refused(lora, settings, message):
    error = ConfigError if "pinned" in settings else BudgetError
    refuse(lora_llama(**lora), error, message, **settings)


def test_an_adapter_merged_before_an_event_is_refused_and_nothing_changes():
    model, _, dynamic = on_chain(total_steps=1)
    model.merge_adapter()
    bases = [layer.module.get_base_layer().weight.clone() for layer in dynamic._layers]
    refuse(model, LayerError, r"'0' is merged .* `model\.unmerge_adapter\(\)`")
    message = r"not be merged .*, got '0' merged into .* `model\.unmerge_adapter\(\)`"
    for change in (dynamic.step, lambda: dynamic.apply(RankPlan(step=1, ranks={"0": 1}))):
        with pytest.raises(LayerError, match=message):
            change()
    assert not dynamic.history
    for layer, base in zip(dynamic._layers, bases, strict=True):
        assert torch.equal(layer.module.get_base_layer().weight, base)


def test_apples_gpu_is_refused_with_what_it_lacks(monkeypatch):
    model = lora_llama()
    optimizer = adamw(model)
    monkeypatch.setattr(nn.Parameter, "device", torch.device("mps:0"), raising=False)
    refuse(model, EngineError, r"float64, got mps, .*`use_cpu=True`", optimizer=optimizer)


def test_an_adapter_deleted_after_its_controller_was_closed_leaves_no_hook_that_asks_for_it():
    model = lora_llama()
    dynamic = attached(model, adamw(model), total_steps=20)
    hooks = ShapeHooks(model, dynamic._layers)  # the Trainer callback's, which stay
    dynamic.close()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.load_state_dict(model.state_dict())
    hooks.close()


def test_a_deleted_adapter_is_named_at_the_next_observation_with_what_comes_before():
    model = lora_llama()
    dynamic = attached(model, adamw(model), total_steps=20)
    model.delete_adapter("default")
    with pytest.raises(LayerError, match=r"'default' must stay.*`close\(\)`.*`delete_adapter`"):
        dynamic.observe()
    dynamic.close()


def test_several_active_adapters_are_refused_by_their_names_and_one_may_be_named():
    model = lora_chain(6, 5, 4)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    optimizer = AdamW(model.parameters())
    refuse(model, LayerError, r"got \['default', 'second'\]: name the one", optimizer=optimizer)
    dynamic = DynamicLora(model, optimizer, DynamicLoraConfig(), adapter_name="second")
    assert dynamic.ranks == {"0": 2}


def test_input_adaptive_ranks_are_refused_in_several_processes(monkeypatch):
    monkeypatch.setattr("dynlora.controller.process_count", lambda: 2)
    model = lora_llama()
    with pytest.raises(ConfigError, match="must be false in 2 processes, but got true"):
        attached(model, adamw(model), input_adaptive=True)


def test_data_parallel_is_refused():
    told = r"got torch\.nn\..*\.DataParallel\. .* DataParallel are not supported"
    refuse(DataParallel(lora_llama()), EngineError, told)


@pytest.mark.parametrize("settings", [{}, {"input_adaptive": True}])
def test_a_second_controller_takes_over_from_one_that_is_still_attached(settings):
    model = lora_llama()
    untouched, optimizer = hooks_of(model), adamw(model)
    first = attached(model, optimizer, total_steps=40, **settings)
    alone = hooks_of(model)
    second = attached(model, optimizer, total_steps=40, **settings)
    assert hooks_of(model) == alone
    tokens = next(sequences())
    loss_of(model, tokens).backward()
    first.observe()
    first.step()
    assert first._analyzer.stats() == {}
    assert len(second._analyzer.stats()) == len(second.ranks)
    first.close()  # once more, which must not touch the second
    assert hooks_of(model) == alone
    assert optimizer._optimizer_load_state_dict_post_hooks
    second.close()
    assert not optimizer._optimizer_load_state_dict_post_hooks
    assert hooks_of(model) == untouched


def test_a_controller_that_loads_its_state_takes_over_again():
    model, optimizer, first = on_chain(8, 8, 8)
    state = first.state_dict()
    second = attached(model, optimizer)
    assert second._adapters._handles
    first.load_state_dict(state)
    assert not second._adapters._handles
    assert first._adapters._handles
    assert all("forward" in vars(layer.module) for layer in first._layers)


@pytest.mark.parametrize("fused", [True, False])
def test_a_controller_takes_over_from_one_that_ended_and_that_nobody_holds(fused):
    model = lora_llama()
    optimizer, dynamic = trained(model, 10, total_steps=10, last_event=0.5)
    state = dynamic.state_dict()
    del dynamic
    gc.collect()
    later = attached(model, optimizer, total_steps=10, last_event=0.5, fused=fused)
    if fused:
        later.load_state_dict(state)
    else:
        assert not any("forward" in vars(module) for module in model.modules())
    later.close()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_refused_controller_leaves_the_one_that_is_there():
    model, optimizer, first = on_chain(8, 8, 8)
    with pytest.raises(ConfigError, match="matches none"):
        attached(model, optimizer, pinned=("x",))
    assert first._adapters._handles


def test_controllers_of_two_adapters_do_not_touch_each_other():
    model, _, first = on_chain(8, 8, 8)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "1"]))
    model.set_adapter("other")
    attached(model, adamw(model))
    assert first._adapters._handles


def test_a_copy_of_a_model_has_a_controller_of_its_own(tmp_path):
    model, _, first = on_chain(8, 8, 8)
    first.close()
    torch.save(model, tmp_path / "whole.pt")
    again = attached(model, adamw(model))
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        attached(copied, adamw(copied))
        assert again._adapters._handles
