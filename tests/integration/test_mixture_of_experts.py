"""Mixtures of experts whose weights transformers fuses, as people name their layers.

`tests/layer_kinds.py` has Mixtral among all other kinds: growing, shrinking, moments, resuming.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.models import sequences, trained

SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SOME = ["q_proj", "v_proj"]
ALL_LINEAR = {"target_modules": "all-linear"}  # PEFT adds the experts and the router
FUSED = {"target_modules": SOME, "target_parameters": ["gate_up_proj", "down_proj"]}


def mixtral():
    config = MixtralConfig(num_local_experts=4, intermediate_size=24, **SIZES)
    return MixtralForCausalLM(config)


def qwen3():
    config = Qwen3MoeConfig(
        num_experts=4, moe_intermediate_size=8, intermediate_size=24, head_dim=8, **SIZES
    )
    return Qwen3MoeForCausalLM(config)


def olmoe():
    return OlmoeForCausalLM(OlmoeConfig(num_experts=4, intermediate_size=8, **SIZES))


def gpt_oss():
    config = GptOssConfig(
        num_local_experts=4,
        intermediate_size=8,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **SIZES,
    )
    return GptOssForCausalLM(config)


def made(make):
    torch.manual_seed(0)
    return make()


def parameters_by_name(model):
    """Return the LoRA parameters of each module and each adapted parameter, from the tensors."""
    counts = {}
    for path, module in model.base_model.model.named_modules():
        if "lora_A" in module._modules:
            name = path.replace(".base_layer", "")
            if "parameter_name" in vars(module):
                name += f".{module.parameter_name}"
            factors = module.lora_A.default.weight, module.lora_B.default.weight
            counts[name] = sum(weight.numel() for weight in factors)
    return counts


# PEFT 0.21 compares patterns with the names of modules only, and says so of parameters' in vain.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did:RuntimeWarning")
@pytest.mark.parametrize(
    ("make", "targets", "stacks"),
    [
        (mixtral, ALL_LINEAR, {"gate_up_proj": (4, 16, 48), "down_proj": (4, 24, 16)}),
        (mixtral, FUSED, {"gate_up_proj": (4, 16, 48), "down_proj": (4, 24, 16)}),
        (qwen3, ALL_LINEAR, {"gate_up_proj": (4, 16, 16), "down_proj": (4, 8, 16)}),
        (olmoe, ALL_LINEAR, {"gate_up_proj": (4, 16, 16), "down_proj": (4, 8, 16)}),
        (gpt_oss, FUSED, {"gate_up_proj": (4, 16, 16), "down_proj": (4, 8, 16)}),
    ],
)
def test_experts_share_the_budget_with_attention_and_stock_peft_loads_them(
    make, targets, stacks, tmp_path
):
    model = get_peft_model(made(make), LoraConfig(r=4, lora_alpha=8, **targets)).train()
    before = sum(parameters_by_name(model).values())
    free = {"hysteresis": 0, "shrink_tolerance": 1.0}
    _, dynamic = trained(model, 20, importance="random", total_steps=20, **free)
    assert dynamic.budget == before

    counts, cheapest = parameters_by_name(model), 16 + 4
    assert counts.keys() == dynamic.ranks.keys()
    assert before - cheapest < sum(counts.values()) <= before
    for place, name in ((p, n) for p in (0, 1) for n in stacks):
        experts, width, height = stacks[name]
        stack = f"model.layers.{place}.mlp.experts.{name}"
        assert counts[stack] == dynamic.ranks[stack] * experts * (width + height)
    assert len({rank for name, rank in dynamic.ranks.items() if "experts" in name}) > 1

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(made(make), tmp_path)
    assert parameters_by_name(loaded) == counts
    tokens = next(sequences(batch=16, seed=9))
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        assert torch.equal(loaded(input_ids=tokens).logits, expected)
        merged = loaded.merge_and_unload()(input_ids=tokens).logits
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=1e-5)
