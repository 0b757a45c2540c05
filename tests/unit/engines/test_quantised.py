"""4-bit layers stay open to gradients when evaluations come between steps."""

import pytest
import torch
from torch import nn

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.engines.checks import keep_gradients
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


@torch.no_grad()
def evaluate(model):
    return model.eval()(**BATCH).logits


def test_an_evaluation_between_steps_changes_no_gradient():
    model = CASES["NF4"].model()
    keep_gradients(model)
    before = gradients(model)
    evaluate(model)
    after = gradients(model)
    assert all(gradient.any() for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_controller_keeps_the_gradients_of_the_model_it_attaches_to():
    model = CASES["NF4"].model()
    DynamicLora(model, adamw(model), DynamicLoraConfig())
    before = gradients(model)
    evaluate(model)
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_that_was_repacked_before_is_refused_by_the_layers_name():
    model = CASES["NF4"].model()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer")
    layer.weight.quant_state.packing_format_for_cpu = True  # as a CPU with AVX512-BF16 does
    with pytest.raises(EngineError, match=r"layers\.1\.mlp\.up_proj.* load the model anew"):
        DynamicLora(model, adamw(model), DynamicLoraConfig())


def test_a_model_that_is_not_quantised_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2))
    before = set(vars(model[0]))
    keep_gradients(model)
    assert set(vars(model[0])) == before
