"""Engines that fix shapes and repacked 4-bit layers are refused by name; others pass."""

import pytest
import torch
from torch import nn

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.engines.checks import check_engine
from dynlora.engines.compiled import is_compiled
from dynlora.engines.ddp import unwrapped
from dynlora.errors import EngineError
from tests.layer_kinds import CASES, texts
from tests.lora_layers import lora_chain
from tests.models import adamw


def test_a_compiled_model_passes_and_is_told_apart_and_unwrapped():
    plain = lora_chain(6, 5)
    compiled = torch.compile(plain, backend="eager")
    check_engine(compiled)
    assert (is_compiled(plain), is_compiled(compiled)) == (False, True)
    assert unwrapped(compiled) is unwrapped(plain) is plain


def test_a_model_of_which_a_part_is_compiled_or_was_replaced_is_told_apart():
    in_place, replaced = lora_chain(6, 5), lora_chain(6, 5)
    in_place.base_model.model[0].compile(backend="eager")
    layers = replaced.base_model.model
    layers[0] = torch.compile(layers[0], backend="eager")
    for model in (in_place, replaced):
        assert is_compiled(model)
        assert unwrapped(model) is model


@pytest.mark.parametrize("name", ["DeepSpeedEngine", "FullyShardedDataParallel"])
def test_engines_that_need_not_be_installed_are_refused_by_their_name(name):
    engine = type(name, (nn.Module,), {"__module__": "some.engine"})
    with pytest.raises(EngineError, match=rf"got some\.engine\.{name}\. With DeepSpeed"):
        check_engine(engine())


BATCH = next(texts())


def gradients(model):
    """Return the gradients of every lora_B by name."""
    model.train()
    model.zero_grad()
    model(**BATCH).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if "lora_B" in n}


def test_an_evaluation_between_steps_of_a_controllers_model_changes_no_gradient():
    model = CASES["NF4"].model()
    repacking = [m for m in model.modules() if "support_avx512bf16_for_cpu" in vars(m)]
    for module in repacking:
        module.support_avx512bf16_for_cpu = True  # as on a CPU with AVX512-BF16
    DynamicLora(model, adamw(model), DynamicLoraConfig())
    assert {module.support_avx512bf16_for_cpu for module in repacking} == {False}
    before = gradients(model)
    with torch.no_grad():
        model.eval()(**BATCH)
    after = gradients(model)
    assert all(gradient.any() for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_that_was_repacked_before_is_refused_by_the_layers_name():
    model = CASES["NF4"].model()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer")
    layer.weight.quant_state.packing_format_for_cpu = True  # as a CPU with AVX512-BF16 does
    with pytest.raises(EngineError, match=r"layers\.1\.mlp\.up_proj.* load the model anew"):
        DynamicLora(model, adamw(model), DynamicLoraConfig())
