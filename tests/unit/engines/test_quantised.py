"""4-bit layers stay open to gradients when evaluations come between steps."""

import pytest
import torch

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.errors import EngineError
from tests.layer_kinds import CASES, texts
from tests.models import adamw

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
