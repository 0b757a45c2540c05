"""Invariant 2: layer.r, tensors, optimizer state, exported patterns and scale tell one rank."""

import copy
import re

import pytest
import torch
from peft import PeftModel

from dynlora import RankPlan
from dynlora.adapters.layers import find_lora_layers
from dynlora.adapters.peft_config import ShapeHooks
from tests.models import adamw, attached, bare_llama, lora_llama, sequences, train


def assert_one_truth(model, optimizer, dynamic, scaling):
    config = model.peft_config["default"]
    for layer in dynamic._layers:
        module = layer.module
        r = module.r["default"]
        A, B = module.lora_A["default"], module.lora_B["default"]
        assert A.weight.shape == (r, module.in_features)
        assert B.weight.shape == (module.out_features, r)
        assert (A.out_features, B.in_features) == (r, r)
        for weight in (A.weight, B.weight):
            moments = optimizer.state.get(weight, {})
            for key in ("exp_avg", "exp_avg_sq"):
                assert key not in moments or moments[key].shape == weight.shape
        exported = [v for key, v in config.rank_pattern.items() if re.match(key, layer.name)]
        assert (exported or [config.r]) == [r]
        assert module.scaling["default"] == scaling
        assert module.lora_alpha["default"] == scaling * r
        assert dynamic.ranks[layer.name] == r


def test_shapes_ranks_patterns_and_scale_agree_after_every_step_of_a_long_run(tiny_llama):
    optimizer = adamw(tiny_llama)
    # Random scores and no tolerance: the most movement that there can be.
    dynamic = attached(
        tiny_llama,
        optimizer,
        importance="random",
        total_steps=150,
        events=25,
        last_event=0.9,
        hysteresis=0,
        shrink_tolerance=1.0,
    )

    def check(step):
        assert_one_truth(tiny_llama, optimizer, dynamic, scaling=2.0)

    train(tiny_llama, optimizer, dynamic, 150, after=check)
    assert len(dynamic.history) == 25
    moves = [
        name
        for event in dynamic.history
        for name, layer in event.layers.items()
        if layer.rank_before != layer.rank_after
    ]
    assert len(moves) >= 100


def test_history_is_what_happened(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = attached(tiny_llama, optimizer, total_steps=60, hysteresis=0)
    seen = [dynamic.ranks]
    train(tiny_llama, optimizer, dynamic, 60, after=lambda _: seen.append(dynamic.ranks))
    costs = {layer.name: layer.cost for layer in dynamic._layers}
    assert len({tuple(ranks.values()) for ranks in seen}) > 1
    for event in dynamic.history:
        assert {n: x.rank_before for n, x in event.layers.items()} == seen[event.step - 1]
        assert {n: x.rank_after for n, x in event.layers.items()} == seen[event.step]
        assert event.parameters == sum(r * costs[n] for n, r in seen[event.step].items())


@pytest.mark.parametrize("mode", ["physical", "static"])
def test_weights_of_an_earlier_step_put_back_are_saved_with_their_own_ranks(mode, tmp_path):
    model = lora_llama()
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, importance="random", total_steps=20, mode=mode)
    if mode == "physical":  # as the Trainer callback does
        ShapeHooks(model, find_lora_layers(model, None))
    first, second, *_ = dynamic.ranks
    dynamic.apply(RankPlan(step=0, ranks={first: 2, second: 5}))
    train(model, optimizer, dynamic, 1)
    earlier = copy.deepcopy(model.state_dict())
    batch = next(iter(sequences(batch=2)))
    expected = model.eval()(input_ids=batch).logits
    dynamic.apply(RankPlan(step=0, ranks={first: 5, second: 2}))
    model.load_state_dict(earlier)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare_llama(), tmp_path)
    torch.testing.assert_close(loaded.eval()(input_ids=batch).logits, expected)
