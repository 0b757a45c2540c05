"""The invariants on every kind of layer, and on models that are wired, held or fed as few are."""

import copy
import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynlora import RankPlan
from dynlora.adapters import resize
from dynlora.integrations.checkpoint import load_state, save_state
from tests import layer_kinds, weird_models
from tests.models import train

CASES = layer_kinds.CASES | weird_models.CASES
STEPS, KEPT = 30, 10
RANKED = re.compile(r"lora_(A|B|embedding_A|embedding_B)\.default(\.weight)?$")
MOST_MOVEMENT = {
    "importance": "random",
    "events": 8,
    "last_event": 0.9,
    "hysteresis": 0,
    "shrink_tolerance": 1.0,
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    # PEFT saves a tensor with several names under one of them, and misses the others.
    "ignore:Found missing adapter keys:UserWarning",
    # PEFT mistakes a bias of `lora_B` for a shard.
    "ignore:Adapter 'default'. .* have invalid shape:peft.utils.warning.PeftWarning",
    # PEFT compares patterns of parameters with modules only.
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
)


def count(model):
    """Count LoRA parameters that have a rank from the tensors themselves."""
    return sum(p.numel() for name, p in model.named_parameters() if RANKED.search(name))


def lora_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@torch.no_grad()
def outputs(model, case):
    return model(**next(case.batches(batch=16, seed=9))).logits


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def run(case):
    """Train once for each case, with the most movement that there can be."""
    torch.manual_seed(0)
    model, optimizer, dynamic = case.started(total_steps=STEPS, **MOST_MOVEMENT)
    held, ranks, kept = [count(model)], [dynamic.ranks], []
    original = resize.write

    def counted(parameter, values):
        original(parameter, values)
        held.append(count(model))

    def after(step):
        ranks.append(dynamic.ranks)
        assert_one_truth(model, optimizer, dynamic)
        if step == KEPT:
            state = dynamic.state_dict(), lora_weights(model), optimizer.state_dict()
            kept.extend(copy.deepcopy(state))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize, "write", counted)
        losses = train(model, optimizer, dynamic, STEPS, case.batches(), after)
    return SimpleNamespace(
        case=case,
        model=model,
        optimizer=optimizer,
        dynamic=dynamic,
        losses=losses,
        ranks=ranks,
        held=held,
        kept=kept,
    )


def assert_one_truth(model, optimizer, dynamic):
    config = model.peft_config["default"]
    for layer in dynamic._layers:
        r = layer.module.r["default"]
        assert dynamic.ranks[layer.name] == r
        assert layer.module.scaling["default"] == 2.0
        assert layer.module.lora_alpha["default"] == 2 * r
        if isinstance(layer.module, nn.Linear):
            A, B = layer.module.lora_A["default"], layer.module.lora_B["default"]
            assert (A.out_features, B.in_features) == (r, r)
        sides = (layer.in_features, layer.out_features)
        for parameter, side in zip(layer.parameters, sides, strict=True):
            assert parameter.numel() == r * side * layer.experts
            for moment in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state.get(parameter, {})
                assert moment not in state or state[moment].shape == parameter.shape
        exported = [v for key, v in config.rank_pattern.items() if re.match(key, layer.name)]
        assert (exported or [config.r]) == [r]


def test_ranks_move_and_tensors_never_hold_more_than_the_budget(run):
    assert len({tuple(ranks.values()) for ranks in run.ranks}) > 2
    assert run.dynamic.budget == run.held[0]
    assert max(run.held) <= run.dynamic.budget
    assert run.dynamic.peak_parameters <= run.dynamic.budget


def test_history_is_what_happened(run):
    events = {event.step: event for event in run.dynamic.history}
    assert tuple(events) == run.dynamic.state_dict()["timetable"]["events"]
    costs = {layer.name: layer.cost for layer in run.dynamic._layers}
    for step in range(1, STEPS + 1):
        before, after = run.ranks[step - 1], run.ranks[step]
        if step in events:
            layers = events[step].layers
            assert {name: x.rank_before for name, x in layers.items()} == before
            assert {name: x.rank_after for name, x in layers.items()} == after
            assert events[step].parameters == sum(r * costs[n] for n, r in after.items())
        else:
            assert before == after


def test_training_goes_on_through_events_and_the_loss_falls(run):
    assert all(torch.isfinite(torch.tensor(run.losses)))
    assert sum(run.losses[-5:]) < 0.9 * sum(run.losses[:5])
    assert not run.dynamic.skipped


def test_stock_peft_loads_what_was_saved_with_equal_outputs(run, tmp_path):
    run.model.save_pretrained(tmp_path)
    assert len(set(run.dynamic.ranks.values())) > 1
    loaded = run.case.load(tmp_path)
    assert torch.equal(outputs(loaded, run.case), outputs(run.model, run.case))


def test_a_resumed_run_ends_bit_for_bit_the_same(run, tmp_path):
    state, weights, optimizer_state = run.kept
    save_state(tmp_path, state)
    model, optimizer, dynamic = run.case.started(total_steps=STEPS, **MOST_MOVEMENT)
    dynamic.load_state_dict(load_state(tmp_path))
    model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict(optimizer_state)
    batches = itertools.islice(run.case.batches(), KEPT, None)
    train(model, optimizer, dynamic, STEPS - KEPT, batches)
    assert dynamic.history == run.dynamic.history
    whole, resumed = lora_weights(run.model), lora_weights(model)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_growing_changes_no_output_and_what_was_grown_learns(case):
    model, optimizer, dynamic = case.started(importance="uniform", total_steps=1000)
    batches = case.batches()
    train(model, optimizer, dynamic, 4, batches)
    half = {layer.name: 2 for layer in dynamic._layers if layer.is_trained}
    dynamic.apply(RankPlan(step=4, ranks=half))
    train(model, optimizer, dynamic, 4, batches)
    before = outputs(model, case)
    dynamic.apply(RankPlan(step=8, ranks=dict.fromkeys(half, 4)))
    grown = outputs(model, case)
    # One rounding of float32 is 1.2e-7 of a value; half precision may add up in another order.
    least = 1e-6 if grown.dtype == torch.float32 else torch.finfo(grown.dtype).eps
    assert (grown - before).abs().max() <= least * max(1.0, float(before.abs().max()))
    assert half
    for layer in dynamic._layers:
        if layer.name in half:
            assert layer.lora_A[..., 2:, :].any(dim=-1).all()
            assert not layer.lora_B[..., 2:].any()
    reached = set()
    for _ in range(3):  # in which every expert but one is asked
        train(model, optimizer, dynamic, 1, batches)
        grown = {layer.name: layer.lora_B[..., 2:] for layer in dynamic._layers}
        reached |= {name for name, B in grown.items() if B.any(dim=-2).all()}
    assert reached >= half.keys() - {"experts.3"}
