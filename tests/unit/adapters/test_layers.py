"""The view of PEFT's LoRA layers: names, fields, and which adapters and layers are found."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora.adapters.layers import find_lora_layers
from dynlora.errors import EngineError, LayerError
from tests.lora_layers import layers_of, lora_chain, one_layer
from tests.models import bare_llama, lora_llama


def test_layers_are_found_under_the_names_of_the_base_model_in_its_order():
    base = bare_llama()
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    assert [layer.name for layer in layers_of(lora_llama())] == names


def two_adapters():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), LoraConfig(r=2, target_modules=["0", "1"])
    )
    model.add_adapter("second", LoraConfig(r=3, target_modules=["1"]))
    return model


def test_the_adapter_of_a_name_is_taken_and_without_a_name_the_active_one():
    model = two_adapters()
    assert {layer.adapter for layer in find_lora_layers(model, None)} == {"default"}
    model.set_adapter("second")
    assert [(x.name, x.r, x.adapter) for x in find_lora_layers(model, None)] == [("1", 3, "second")]
    model.add_adapter("sec", LoraConfig(r=1, target_modules=["0"]))  # a part of another name
    assert [(x.name, x.r) for x in find_lora_layers(model, "sec")] == [("0", 1)]


def test_an_adapter_that_the_model_lacks_is_refused_with_those_it_has():
    with pytest.raises(LayerError, match=r"Adapter 'third' .* are \['default', 'second'\]"):
        find_lora_layers(two_adapters(), "third")


def test_two_peft_models_in_one_module_are_refused_by_their_places():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = two_adapters()
            self.text = two_adapters()

    with pytest.raises(LayerError, match=r"one PEFT model, got 2 in a Pair: 'query' and 'text'"):
        find_lora_layers(Pair(), None)


def test_parameters_of_a_type_of_their_own_are_refused_with_that_type():
    class Sharded(nn.Parameter):
        pass

    model = lora_chain(6, 5)
    linear = layers_of(model)[0].module.lora_A["default"]
    linear.weight = Sharded(torch.zeros(4, 6))
    with pytest.raises(EngineError, match=r"sharded by FSDP2 .* got a Sharded"):
        find_lora_layers(model, None)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("r", [3, 7, 15, 49])
def test_pefts_own_recomputations_give_the_scale_at_any_rank_to_the_last_bits(r, use_rslora):
    layer = one_layer(64, 64, r=r, lora_alpha=16, use_rslora=use_rslora)
    assert layer.alpha == 16
    scaling = layer.scaling
    for rank in range(1, 65):
        layer.set_fields(r=rank, scaling=scaling)
        divisor = rank**0.5 if use_rslora else rank
        assert abs(layer.alpha / divisor - scaling) <= 1e-15 * scaling
        layer.module.set_scale("default", 1)
        assert layer.scaling == pytest.approx(scaling, rel=1e-15)
    layer.module.scale_layer(3)
    layer.module.unscale_layer()
    assert layer.scaling == pytest.approx(scaling, rel=1e-15)
