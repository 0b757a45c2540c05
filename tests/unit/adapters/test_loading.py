"""Shape hooks: a checkpoint of other ranks loads, and the layer's fields follow."""

import copy
import pickle

import pytest
import torch

from dynlora.adapters.peft_config import ShapeHooks
from dynlora.adapters.resize import set_rank
from tests.layer_kinds import CASES
from tests.lora_layers import layers_of, lora_chain


def resized_state(*ranks):
    """Return the state dict of a chain whose layers have these ranks, with random content."""
    model = lora_chain(8, 10, 6, seed=1)
    for layer, rank in zip(layers_of(model), ranks, strict=True):
        set_rank(layer, rank)
        for weight in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(weight)
    return model.state_dict()


def test_a_checkpoint_of_other_ranks_loads_whole_until_the_hooks_are_closed():
    model, ranks = lora_chain(8, 10, 6), (2, 7)
    layers, state = layers_of(model), resized_state(*ranks)
    ShapeHooks(model, layers).close()
    with pytest.raises(RuntimeError, match=r"size mismatch .*\[2, 8\]\) .*\[4, 8\]\)"):
        model.load_state_dict(state)
    assert [layer.r for layer in layers] == [4, 4]
    ShapeHooks(model, layers)
    model.load_state_dict(state)
    assert tuple(layer.r for layer in layers) == ranks
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert [layer.scaling for layer in layers] == [1.5, 1.5]
    assert [layer.module.lora_alpha["default"] for layer in layers] == [1.5 * r for r in ranks]


def test_other_adapters_keep_their_ranks():
    from peft import LoraConfig

    model = lora_chain(8, 10, 6)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "1"]))
    other = {key: value for key, value in model.double().state_dict().items() if ".other." in key}
    ShapeHooks(model, layers_of(model))
    model.load_state_dict(resized_state(3, 5) | other)
    assert [layer.module.r for layer in layers_of(model)] == [
        {"default": 3, "other": 2},
        {"default": 5, "other": 2},
    ]


def test_a_copy_of_the_model_follows_its_own_loads_and_leaves_the_original():
    model = lora_chain(6, 5, r=4)
    ShapeHooks(model, layers_of(model))
    smaller = lora_chain(6, 5, r=2).state_dict()
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        duplicate.load_state_dict(smaller)
        assert layers_of(duplicate)[0].r == 2
        assert list(duplicate.peft_config["default"].rank_pattern.values()) == [2]
    assert layers_of(model)[0].r == 4
    assert layers_of(model)[0].lora_B.any()
    assert not model.peft_config["default"].rank_pattern


@pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape")  # PEFT means the biases
@pytest.mark.filterwarnings("ignore:.*embedding.*:UserWarning")
@pytest.mark.parametrize("kind", CASES)
def test_adapters_of_other_ranks_load_into_every_kind_of_layer(kind, tmp_path):
    case = CASES[kind]
    saved = case.model(r=3)
    for layer in layers_of(saved):
        for parameter in layer.parameters:
            torch.nn.init.normal_(parameter)
    saved.save_pretrained(tmp_path)
    model = case.model(r=5)
    ShapeHooks(model, layers_of(model))
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert {layer.r for layer in layers_of(model)} == {3}
    for ours, theirs in zip(layers_of(model), layers_of(saved), strict=True):
        assert torch.equal(ours.lora_A, theirs.lora_A)
        assert torch.equal(ours.lora_B, theirs.lora_B)
