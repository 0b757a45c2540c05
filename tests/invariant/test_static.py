"""Static mode: shapes that never change, and a run that is otherwise the physical one.

For every kind of layer. Several processes, which need this mode, are in `distributed/`.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel

from dynlora import DynamicLoraConfig, RankPlan, make_static
from dynlora.errors import BudgetError, ConfigError, LayerError
from tests.layer_kinds import CASES
from tests.lora_layers import layers_of, lora_chain
from tests.models import adamw, attached, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
)

STEPS = 30
SETTINGS = {
    "importance": "random",  # ranks move far, in every case
    "total_steps": STEPS,
    "hysteresis": 0,
    "uniform_mix": 0,
    "shrink_tolerance": 1,
}


def test_no_layer_is_held_at_a_rank_above_its_own_width():
    model = lora_chain(32, 6, 20, r=4)
    make_static(model, DynamicLoraConfig(max_rank=16))
    assert [layer.capacity for layer in layers_of(model)] == [6, 6]
    assert [tuple(layer.factor_A.parameter.shape) for layer in layers_of(model)] == [
        (6, 32),
        (6, 6),
    ]


def run(case, mode, *, dtype=torch.float64, budget_end=None):
    model = case.model().to(dtype)
    optimizer = adamw(model, weight_decay=0.01)
    dynamic = attached(model, optimizer, mode=mode, budget_end=budget_end, **SETTINGS)
    held = [(f.parameter.data_ptr(), f.parameter.shape) for _, f in factors(dynamic)]
    batches = ({k: _as(v, dtype) for k, v in batch.items()} for batch in case.batches())
    train(model, optimizer, dynamic, STEPS, batches)
    return SimpleNamespace(model=model, optimizer=optimizer, dynamic=dynamic, held=held)


def _as(tensor, dtype):
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


KINDS = ["Linear", "Conv1D", "Embedding", "Conv2d"]
"""Quantised bases, which float64 does not go with, hold their factors as `Linear` does."""


@pytest.fixture(scope="module", params=[(kind, None) for kind in KINDS] + [("Linear", 0.5)])
def pair(request):
    """Return a case, and the same run in both modes."""
    kind, end = request.param
    case = CASES[kind]
    return case, run(case, "physical", budget_end=end), run(case, "static", budget_end=end)


def factors(dynamic):
    return [(x, factor) for x in dynamic._layers for factor in (x.factor_A, x.factor_B)]


def test_both_modes_give_the_same_ranks_and_weights(pair):
    _, physical, static = pair
    assert static.dynamic.mode == "static"
    assert physical.dynamic.ranks == static.dynamic.ranks
    assert len(set(static.dynamic.ranks.values())) > 1
    for figure in ("parameters", "peak_parameters"):
        assert getattr(static.dynamic, figure) == getattr(physical.dynamic, figure)
    assert static.dynamic.parameters <= static.dynamic.budget
    left = static.dynamic.config.budget_left(static.dynamic.peak_parameters)
    assert static.dynamic.budget == left
    ours, theirs = static.model.state_dict(), physical.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if "lora" in name:
            assert torch.allclose(value, theirs[name], rtol=1e-6, atol=1e-6), name


def test_what_is_beyond_the_live_rank_is_exactly_zero_in_weights_gradients_and_moments(pair):
    _, _, static = pair
    for layer, factor in factors(static.dynamic):
        parameter = factor.parameter
        assert factor.size > layer.r or layer.r == min(layer.in_features, layer.out_features)
        state = static.optimizer.state[parameter]
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]):
            dead = tensor.narrow(factor.rank_axis, layer.r, factor.size - layer.r)
            assert torch.count_nonzero(dead) == 0


def test_no_tensor_is_replaced_or_changes_its_shape(pair):
    _, _, static = pair
    now = [(f.parameter.data_ptr(), f.parameter.shape) for _, f in factors(static.dynamic)]
    assert now == static.held


@torch.no_grad()
def logits(model, case):
    batch = next(case.batches(batch=8, seed=9))
    return model.eval()(**{k: _as(v, torch.float64) for k, v in batch.items()}).logits


def test_the_saved_adapter_is_at_the_live_ranks_and_plain_peft_computes_the_same(pair, tmp_path):
    case, physical, static = pair
    static.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base().double(), tmp_path).double()
    saved = {k: v.shape for k, v in loaded.state_dict().items() if "lora" in k}
    assert saved == {k: v.shape for k, v in physical.model.state_dict().items() if "lora" in k}
    assert torch.allclose(logits(loaded, case), logits(static.model, case), atol=1e-6)


def test_a_copy_of_the_model_saves_the_live_ranks_too(pair):
    _, _, static = pair
    twin = copy.deepcopy(static.model)
    for name, value in static.model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)


# What may go wrong around it.


def test_no_layer_is_planned_or_loaded_above_what_its_tensors_hold():
    case = CASES["Linear"]
    model = case.model()
    make_static(model, DynamicLoraConfig(max_rank=6))
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, **SETTINGS)  # a highest rank of 32
    train(model, optimizer, dynamic, STEPS, case.batches())
    assert 4 < max(dynamic.ranks.values()) <= 6
    with pytest.raises(BudgetError, match="must be at most 6, at which its tensors are held"):
        dynamic.apply(RankPlan(step=0, ranks={case.layer: 7}))
    with pytest.raises(LayerError, match=r"must be of rank 6 at most.*got 7"):
        model.load_state_dict(case.model(r=7).state_dict())


def test_moments_beyond_the_rank_of_loaded_weights_are_forgotten():
    """Else Adam would move weights there that nobody counts, and nobody saves."""
    case = CASES["Linear"]
    wide, narrow = case.model(r=6), case.model(r=4)
    optimizer = adamw(wide)
    train(wide, optimizer, None, 3, case.batches())
    make_static(wide, DynamicLoraConfig(max_rank=16))
    wide.load_state_dict(narrow.state_dict())
    dynamic = attached(wide, optimizer, importance="uniform", total_steps=100)
    assert set(dynamic.ranks.values()) == {4}
    train(wide, optimizer, dynamic, 3, case.batches())
    for layer, factor in factors(dynamic):
        assert torch.count_nonzero(factor.parameter.narrow(factor.rank_axis, 4, 12)) == 0, layer


def test_a_controller_that_could_not_be_made_leaves_the_model_as_it_was():
    model = lora_chain(6, 5, 4).train()
    optimizer = adamw(model)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ConfigError, match="attention"):
        attached(model, optimizer, mode="static", importance="attention_entropy", total_steps=10)
    assert [p.shape for p in model.parameters()] == shapes
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_an_adapter_that_was_added_anew_is_not_taken_for_a_static_one():
    model = lora_chain(6, 5, 4)
    make_static(model, DynamicLoraConfig())
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=2, target_modules=["0", "1"]))
    model.set_adapter("default")
    assert all(layer.capacity is None for layer in layers_of(model))


def test_after_weights_of_lower_ranks_were_put_back_nothing_beyond_them_moves():
    case = CASES["Linear"]
    model = case.model(r=6)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, mode="static", importance="uniform", total_steps=100)
    train(model, optimizer, dynamic, 3, case.batches())
    dynamic.freeze()
    model.load_state_dict(case.model(r=4).state_dict())
    assert set(dynamic.ranks.values()) == {4}
    train(model, optimizer, dynamic, 3, case.batches())
    for layer, factor in factors(dynamic):
        assert not factor.parameter.narrow(factor.rank_axis, 4, factor.size - 4).any(), layer
