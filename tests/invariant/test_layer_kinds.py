"""The invariants of growing, shrinking, budget, one truth, optimizer and resume, for every kind.

`Linear`, which the other files test at length, is here as the control of these tests.
"""

import copy
import json
import re

import pytest
import torch
from peft import PeftModel
from torch.optim import SGD, AdamW

from dynlora import RankPlan
from dynlora.adapters import resize
from dynlora.integrations.checkpoint import load_state, save_state
from tests.layer_kinds import CASES, train
from tests.models import adamw, attached

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def outputs(model, case):
    return model(**next(case.batches(batch=16, seed=9))).logits


def all_at(dynamic, rank):
    return RankPlan(step=0, ranks=dict.fromkeys(dynamic.ranks, rank))


def trained_at_2(case):
    """Train at rank 4, halve every rank, train on."""
    model = case.model().train()
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, importance="uniform", total_steps=1000)
    batches = case.batches()
    train(model, optimizer, dynamic, 12, batches)
    dynamic.apply(all_at(dynamic, 2))
    train(model, optimizer, dynamic, 10, batches)
    return model, optimizer, dynamic, batches


def test_growing_changes_no_output_and_what_was_grown_learns(case):
    model, optimizer, dynamic, batches = trained_at_2(case)
    before = outputs(model, case)
    dynamic.apply(all_at(dynamic, 4))
    # One rounding of float32 is 1.2e-7 of a value.
    assert (outputs(model, case) - before).abs().max() <= 1e-6 * max(1.0, float(before.abs().max()))
    train(model, optimizer, dynamic, 2, batches)
    for layer in dynamic._layers:
        assert layer.lora_A[2:].any(dim=1).all()
        assert layer.lora_B[:, 2:].any(dim=0).all()


def delta(layer):
    """Return what PEFT would merge, as a matrix from tokens to what is added."""
    module = layer.module
    merged = module.get_delta_weight(layer.adapter).double()
    if type(module.get_base_layer()).__name__ in ("Conv1D", "Embedding"):
        return merged.T  # (in, out) there
    return merged.flatten(1)


def vectors(layer, tokens):
    """Return observed tokens as rows whose squares add up to the mean that a shrink must keep.

    Ids are one-hot rows; those seen once, and one more, stand for all that were not seen.
    """
    n = len(tokens)
    if tokens.is_floating_point():
        return tokens.double() / n**0.5
    ids = layer.module.in_features
    unseen = (sum(tokens.tolist().count(i) == 1 for i in range(ids)) + 1) / (n + 1)
    one_hot = torch.nn.functional.one_hot(tokens, ids).double()
    every = torch.eye(ids, dtype=torch.float64)
    return torch.cat([((1 - unseen) / n) ** 0.5 * one_hot, (unseen / ids) ** 0.5 * every])


@torch.no_grad()
def test_shrinking_loses_the_least_on_the_observed_inputs_and_says_how_much(case):
    model = case.model().train()
    optimizer = adamw(model, lr=2e-2)
    dynamic = attached(model, optimizer, importance="uniform", total_steps=1000)
    with torch.enable_grad():
        train(model, optimizer, dynamic, 30, case.batches())
    features = dynamic._analyzer.stats()
    assert features.keys() == dynamic.ranks.keys()
    seen = {x.name: vectors(x, features[x.name].tokens) for x in dynamic._layers}
    before = {x.name: seen[x.name] @ delta(x).T for x in dynamic._layers}
    event = dynamic.apply(all_at(dynamic, 2))
    for layer in dynamic._layers:
        name = layer.name
        tail = float(torch.linalg.svdvals(before[name])[2:].norm())  # dense oracle
        assert tail > 0
        error = float((seen[name] @ delta(layer).T - before[name]).norm())
        assert error == pytest.approx(tail, rel=1e-3)
        relative = tail / features[name].output_power ** 0.5
        assert event.layers[name].output_lost == pytest.approx(relative, rel=1e-3)


def test_tensors_never_hold_more_than_the_budget_at_any_moment(case, monkeypatch):
    model = case.model().train()
    optimizer = adamw(model)
    dynamic = attached(
        model, optimizer, importance="random", total_steps=40, hysteresis=0, shrink_tolerance=1
    )

    def count():
        return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)

    assert dynamic.budget == count()
    peak, original = 0, resize.set_data

    def counted(parameter, data):
        nonlocal peak
        original(parameter, data)
        peak = max(peak, count())

    monkeypatch.setattr(resize, "set_data", counted)
    ranks = []
    train(model, optimizer, dynamic, 40, case.batches(), lambda _: ranks.append(dynamic.ranks))
    assert len({tuple(r.values()) for r in ranks}) > 3
    assert 0 < peak <= dynamic.budget


SHAPES = {
    "Linear": ("lora_A.default.weight", (32,), "lora_B.default.weight", (32,)),
    "Conv1D": ("lora_A.default.weight", (32,), "lora_B.default.weight", (96,)),
    "Embedding": ("lora_embedding_A.default", (16,), "lora_embedding_B.default", (32,)),
    "Conv2d": ("lora_A.default.weight", (16, 3, 2), "lora_B.default.weight", (24,)),
    "NF4": ("lora_A.default.weight", (64,), "lora_B.default.weight", (64,)),
    "int8": ("lora_A.default.weight", (64,), "lora_B.default.weight", (64,)),
}


@pytest.mark.parametrize("kind", CASES)
def test_shapes_fields_moments_and_pattern_tell_one_rank_after_every_step(kind):
    case = CASES[kind]
    model = case.model().train()
    optimizer = adamw(model)
    settings = {"hysteresis": 0, "shrink_tolerance": 1.0, "events": 10, "last_event": 0.9}
    dynamic = attached(model, optimizer, importance="random", total_steps=40, **settings)
    module = {layer.name: layer.module for layer in dynamic._layers}[case.layer]
    key_A, width, key_B, height = SHAPES[kind]
    seen = set()

    def check(step):
        r = dynamic.ranks[case.layer]
        seen.add(r)
        parameters = dict(module.named_parameters())
        assert parameters[key_A].shape == (r, *width)
        ones = (1, 1) if kind == "Conv2d" else ()
        assert parameters[key_B].shape == (*height, r, *ones)
        for key in (key_A, key_B):
            assert optimizer.state[parameters[key]]["exp_avg"].shape == parameters[key].shape
            assert optimizer.state[parameters[key]]["exp_avg_sq"].shape == parameters[key].shape
        assert module.r["default"] == r
        assert module.scaling["default"] == 2.0
        assert module.lora_alpha["default"] == 2 * r
        config = model.peft_config["default"]
        exported = [
            v for pattern, v in config.rank_pattern.items() if re.match(pattern, case.layer)
        ]
        assert (exported or [config.r]) == [r]

    train(model, optimizer, dynamic, 40, case.batches(), check)
    assert len(seen) > 2
    if kind != "Embedding":  # whose parameters stand alone
        printed = [str(module.lora_A), str(module.lora_B)]
        assert all(f"{dynamic.ranks[case.layer]}, " in text for text in printed)


def first_moments(case, make, key, *, resize_first):
    """Return moments after 8 steps with a learning rate of 0, and resizes before or after them."""
    model = case.model().train()
    optimizer = make(trainable(model))
    dynamic = attached(model, optimizer, importance="uniform", total_steps=1000)
    for layer in dynamic._layers:
        generator = torch.Generator().manual_seed(len(layer.name))
        B = 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
        A = layer.lora_A.detach().clone()
        A[3], B[:, 3] = A[0] - A[1], B[:, 2]  # rank 3, so that the shrink loses nothing
        for factor, matrix in ((layer.factor_A, A), (layer.factor_B, B)):
            factor.parameter.data.copy_(factor.from_matrix(matrix))
    dynamic.freeze()  # no tokens: the same change whenever it comes

    def resized():
        dynamic.apply(all_at(dynamic, 3))
        dynamic.apply(RankPlan(step=0, ranks={case.layer: 4}))

    if resize_first:
        resized()
    train(model, optimizer, None, 8, case.batches())
    if not resize_first:
        resized()
    return {
        (layer.name, index): factor.to_matrix(optimizer.state[factor.parameter][key])
        for layer in dynamic._layers
        for index, factor in enumerate((layer.factor_A, layer.factor_B))
    }


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda ps: AdamW(ps, lr=0.0), "exp_avg"),
        (lambda ps: SGD(ps, lr=0.0, momentum=0.9), "momentum_buffer"),
    ],
    ids=["AdamW", "SGD"],
)
def test_first_moments_are_those_that_training_in_the_new_basis_would_have(case, make, key):
    carried = first_moments(case, make, key, resize_first=False)
    trained = first_moments(case, make, key, resize_first=True)
    assert carried.keys() == trained.keys()
    for (name, rank_axis), moment in trained.items():
        # What was grown has seen no gradient in the one, and eight in the other.
        ours, theirs = (m.narrow(rank_axis, 0, 3) for m in (carried[name, rank_axis], moment))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-6)
        assert theirs.any()


def test_no_element_moves_more_than_one_learning_rate_right_after_an_event(case):
    model = case.model().train()
    optimizer = AdamW(trainable(model), lr=5e-3, weight_decay=0.0)
    dynamic = attached(model, optimizer, importance="uniform", total_steps=10_000)
    batches = case.batches()
    train(model, optimizer, dynamic, 60, batches)
    names = list(dynamic.ranks)
    dynamic.apply(all_at(dynamic, 3))
    dynamic.apply(RankPlan(step=60, ranks=dict.fromkeys(names[: len(names) // 2], 4)))
    before = [p.detach().clone() for p in trainable(model)]
    train(model, optimizer, dynamic, 1, batches)
    for old, new in zip(before, trainable(model), strict=True):
        assert (new.detach() - old).abs().max() <= 5e-3 * (1 + 1e-4)


def test_stock_peft_loads_what_was_saved_with_equal_outputs_and_ranks(case, tmp_path):
    model = case.model().train()
    optimizer = adamw(model)
    free = {"hysteresis": 0, "shrink_tolerance": 1.0}
    dynamic = attached(model, optimizer, importance="random", total_steps=40, **free)
    train(model, optimizer, dynamic, 40, case.batches())
    assert len(set(dynamic.ranks.values())) > 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    # In training mode, which is the same without dropout: bitsandbytes has another kernel for eval.
    assert torch.equal(outputs(loaded.train(), case), outputs(model, case))
    for layer in dynamic._layers:
        module = loaded.base_model.model.get_submodule(layer.name)
        assert module.r["default"] == layer.r
        assert module.scaling["default"] == layer.scaling
    keys = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    for name, rank in dynamic.ranks.items():
        assert [keys[key] for key in keys if re.match(key, name)] == [rank] * (rank != 4)


@pytest.mark.parametrize("killed_at", [13])
def test_a_resumed_run_ends_bit_for_bit_the_same(case, killed_at, tmp_path):
    settings = {"total_steps": 24, "hysteresis": 0, "shrink_tolerance": 1.0}

    def started():
        model = case.model().train()
        optimizer = adamw(model)
        return model, optimizer, attached(model, optimizer, **settings)

    def weights(model):
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    model, optimizer, dynamic = started()
    kept = {}

    def keep(step):
        if step == killed_at:
            save_state(tmp_path, dynamic.state_dict())
            kept.update(copy.deepcopy({"w": weights(model), "o": optimizer.state_dict()}))

    train(model, optimizer, dynamic, 24, case.batches(), keep)
    again, its_optimizer, its_dynamic = started()
    its_dynamic.load_state_dict(load_state(tmp_path))
    again.load_state_dict(kept["w"], strict=False)
    its_optimizer.load_state_dict(kept["o"])
    batches = case.batches()
    for _ in range(killed_at):
        next(batches)
    train(again, its_optimizer, its_dynamic, 24 - killed_at, batches)
    assert its_dynamic.history == dynamic.history
    whole, resumed = weights(model), weights(again)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(set(dynamic.ranks.values())) > 1
