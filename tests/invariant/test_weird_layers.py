"""What each kind of weird layer promises beside the invariants of `test_models`."""

import copy
import itertools

import pytest
import torch

from dynlora import RankPlan
from dynlora.importance.agreement import GradientDirections
from dynlora.integrations.checkpoint import load_state, save_state
from tests.models import attached, loss_of, train
from tests.weird_models import CASES, WIDTH, parts, points

FREE = {"hysteresis": 0, "shrink_tolerance": 1.0}
ROUTED = CASES["no gradient in some steps"]


def run(case, steps, **settings):
    """Train a model; return it with its optimizer and controller."""
    model, optimizer, dynamic = case.started(total_steps=steps, **settings)
    train(model, optimizer, dynamic, steps, case.batches())
    return model, optimizer, dynamic


def layers_by_name(dynamic):
    return {layer.name: layer for layer in dynamic._layers}


@torch.no_grad()
def test_a_shrink_loses_the_least_over_all_uses_of_a_layer_in_one_forward():
    case = CASES["used twice"]
    model, optimizer, dynamic = case.started(importance="uniform", total_steps=400)
    batches = list(itertools.islice(case.batches(batch=24), 8))  # of which the first is sampled
    with torch.enable_grad():
        train(model, optimizer, dynamic, 8, iter(batches))
    inputs, nothing = batches[0]["inputs"], torch.zeros(24, WIDTH)
    both = torch.cat([torch.cat([inputs, nothing], 1), torch.cat([nothing, inputs], 1)])
    encode = layers_by_name(dynamic)["encode"].module
    before = both @ encode.get_delta_weight("default").T
    event = dynamic.apply(RankPlan(step=8, ranks={"encode": 2}))
    error = both @ encode.get_delta_weight("default").T - before
    least = float(torch.linalg.svdvals(before)[2:].norm())  # dense oracle
    assert least > 0
    assert float(error.norm()) == pytest.approx(least, rel=1e-3)
    whole = float((both @ encode.weight.T + encode.bias + before).norm())
    assert event.layers["encode"].output_lost == pytest.approx(least / whole, rel=0.05)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_a_shared_layer_is_saved_at_its_rank_under_any_of_its_names(tmp_path):
    case = CASES["shared layers"]
    model, _, dynamic = run(case, 30, importance="random", **FREE)
    ranks = dynamic.ranks
    assert ranks["blocks.0.up"] != 4
    state = model.state_dict()
    for block in range(3):
        weight = state[f"base_model.model.blocks.{block}.up.lora_A.default.weight"]
        assert weight.shape == (ranks["blocks.0.up"], 16)
    model.save_pretrained(tmp_path)
    batch = next(case.batches(seed=9))
    with torch.no_grad():
        torch.testing.assert_close(case.load(tmp_path)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("importance", ["signal", "sensitivity", "magnitude", "random"])
def test_a_layer_that_no_step_has_reached_gets_the_lowest_rank_and_is_named_once(
    importance, caplog
):
    _, _, dynamic = run(ROUTED, 40, importance=importance)
    informed = [e for e in dynamic.history if any(x.score for x in e.layers.values())]
    assert len(informed) > 1
    for event in informed:
        assert event.layers["experts.3"].rank_after == 1
        assert event.layers["experts.3"].score is None
        assert all(x.score for name, x in event.layers.items() if name != "experts.3")
    assert min(rank for name, rank in dynamic.ranks.items() if "experts.3" not in name) > 1
    told = [r.getMessage() for r in caplog.records if "had no gradient" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("1 of 6 layers had no gradient")
    assert told[0].endswith(": experts.3")


def test_without_scores_a_layer_that_no_step_has_reached_keeps_its_rank(caplog):
    _, _, dynamic = run(ROUTED, 20, importance="uniform")
    assert set(dynamic.ranks.values()) == {4}
    assert "had no gradient" not in caplog.text


def test_what_a_layer_without_gradients_adds_is_kept_within_the_tolerance():
    model = ROUTED.model()
    with torch.no_grad():
        model.get_submodule("base_model.model.experts.3").lora_B["default"].weight.normal_()
    dynamic = attached(model, optimizer := ROUTED.adamw(model), total_steps=40)
    train(model, optimizer, dynamic, 40, ROUTED.batches())
    last = dynamic.history[-1].layers["experts.3"]
    assert last.rank_after > 1
    assert last.waits


def test_an_expert_that_any_observed_step_has_reached_is_scored_after_a_resume_too(tmp_path):
    def batches():  # of which the first three reach the last expert alone
        for step, batch in enumerate(ROUTED.batches()):
            yield batch | ({"route": torch.full((32,), 3)} if step < 3 else {})

    model, optimizer, dynamic = ROUTED.started(total_steps=40)
    given = batches()
    train(model, optimizer, dynamic, 4, given)
    save_state(tmp_path, dynamic.state_dict())
    other, its_optimizer, resumed = ROUTED.started(total_steps=40)
    resumed.load_state_dict(load_state(tmp_path))
    other.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, dynamic, 36, given)
    train(other, its_optimizer, resumed, 36, itertools.islice(batches(), 4, None))
    assert resumed.history == dynamic.history
    scores = [event.layers["experts.3"].score for event in dynamic.history]
    assert scores[-1] is not None


def test_a_layer_whose_gradients_never_were_finite_counts_as_average():
    model, optimizer, dynamic = ROUTED.started(total_steps=40)
    expert = model.get_submodule("base_model.model.experts.2").lora_B["default"].weight

    def overflow(weight):
        weight.grad.fill_(torch.nan)

    expert.register_post_accumulate_grad_hook(overflow)
    optimizer.register_step_pre_hook(lambda *_: setattr(expert, "grad", None))  # as a scaler does
    train(model, optimizer, dynamic, 40, ROUTED.batches())
    last = dynamic.history[-1].layers
    assert dynamic.skipped["experts.2"]
    assert last["experts.2"].score is None
    shares = [layer.share for layer in last.values()]
    assert 0 == last["experts.3"].share < min(s for s in shares if s) < last["experts.2"].share


def test_a_layer_that_no_step_has_reached_learns_once_one_does():
    model, optimizer, dynamic = run(ROUTED, 40, **FREE)
    expert = layers_by_name(dynamic)["experts.3"]
    assert not expert.lora_B.any()
    assert all(p not in optimizer.state for p in expert.parameters)
    asked = [batch | {"route": torch.full((32,), 3)} for batch in itertools.islice(points(), 2)]
    train(model, optimizer, dynamic, 2, iter(asked))
    assert expert.lora_B.any(dim=0).all()


@torch.no_grad()
def test_a_layer_with_more_rank_than_features_gives_back_what_adds_nothing():
    case = CASES["narrower than the rank"]
    model, optimizer, dynamic = case.started(
        total_steps=40, importance="random", hysteresis=0, shrink_tolerance=1e-4
    )
    batch = next(case.batches(seed=9))
    with torch.enable_grad():
        train(model, optimizer, dynamic, 5, case.batches())
    before = model(**batch).logits
    event = dynamic.apply(RankPlan(step=5, ranks={"narrow": 3, "widen": 3}))
    assert max(layer.output_lost for layer in event.layers.values()) < 1e-6
    assert (model(**batch).logits - before).abs().max() <= 1e-6 * float(before.abs().max())
    with torch.enable_grad():
        train(model, optimizer, dynamic, 35, case.batches())
    # No plan gives a rank that a matrix of that size cannot have; others get what is left.
    assert len(dynamic.history) > 4
    for event in dynamic.history:
        assert max(event.layers[name].rank_after for name in ("narrow", "widen")) <= 3
    assert max(dynamic.ranks[name] for name in ("first", "mix")) > 4


def test_less_than_a_rank_of_the_cheapest_layer_that_could_grow_stays_unspent_at_unequal_cost(
    monkeypatch,
):
    # Of two layers the one whose gradients have fewer directions is held, and then so is the other.
    monkeypatch.setattr(GradientDirections, "counts", lambda self, layers: {})
    case = CASES["unequal cost"]
    settings = {"importance": "random", "events": 10, "last_event": 1.0, "max_rank": 6}
    model, optimizer, dynamic = case.started(total_steps=40, **settings, **FREE)
    costs = {layer.name: layer.cost for layer in dynamic._layers}
    held = []

    def count(step):
        held.append(sum(p.numel() for name, p in model.named_parameters() if "lora_" in name))

    train(model, optimizer, dynamic, 40, case.batches(), count)
    for event in dynamic.history:
        growable = [  # up to the effective rank of the input, above which no layer grows
            costs[name]
            for name, layer in event.layers.items()
            if layer.rank_after < min(6, max(layer.rank_before, round(layer.effective_rank)))
        ]
        assert 0 <= dynamic.budget - held[event.step - 1] < min(growable, default=dynamic.budget)
    assert len(set(held)) > 1


PLAIN = CASES["narrower than the rank"]  # which is plain as to its batches


def test_empty_batches_between_others_leave_a_run_that_of_plain_peft_bit_for_bit():
    runs = []
    for with_dynamic in (False, True):
        model = PLAIN.model()
        optimizer = PLAIN.adamw(model)
        dynamic = None
        if with_dynamic:
            dynamic = attached(model, optimizer, importance="uniform", fused=False, total_steps=24)
        batches = PLAIN.batches()
        mixed = (part for batch in batches for part in parts(batch, [0, 32, 0]))
        losses = train(model, optimizer, dynamic, 24, mixed)
        runs.append((losses, [p.detach() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1], runs[1][1], strict=True))
    assert 0.0 in runs[0][0]


def test_an_empty_part_of_an_accumulated_batch_changes_no_rank_and_no_weight():
    runs = []
    for sizes in ([16, 16], [0, 16, 16, 0], [16, 0, 16]):
        model, optimizer, dynamic = PLAIN.started(total_steps=30, importance="signal", **FREE)

        def accumulated(model, batch, sizes=sizes):
            *others, last = parts(batch, sizes)
            for part in others:
                loss_of(model, part).backward()
            return loss_of(model, last)

        train(model, optimizer, dynamic, 30, PLAIN.batches(), loss=accumulated)
        assert len(set(dynamic.ranks.values())) > 1
        assert not dynamic.skipped
        runs.append((dynamic.history, [p.detach() for p in model.parameters()]))
    for history, weights in runs[1:]:
        assert history == runs[0][0]
        assert all(torch.equal(one, other) for one, other in zip(weights, runs[0][1], strict=True))
