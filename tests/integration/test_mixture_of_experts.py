"""Mixtures of experts whose weights transformers fuses: the refusal's advice works."""

import ast
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dynlora.errors import LayerError
from tests.models import adamw, attached, trained

SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def small_mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES))


def small_qwen():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=4, moe_intermediate_size=16, head_dim=8, **SIZES)
    )


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("make", [small_mixtral, small_qwen])
def test_the_advice_of_the_refusal_of_experts_trains(make):
    model = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(LayerError, match="ParamWrapper") as refusal:
        attached(model, adamw(model))
    advised = re.search(r"`target_modules=(\[.*?\])`", str(refusal.value))
    targets = ast.literal_eval(advised[1])

    model = get_peft_model(make(), LoraConfig(r=4, target_modules=targets))
    free = {"hysteresis": 0, "shrink_tolerance": 1.0}
    _, dynamic = trained(model, 20, importance="random", total_steps=20, **free)
    assert len(dynamic.ranks) == 8
    assert len(set(dynamic.ranks.values())) > 1
