"""Base models: whether all weights are there, and how many tokens they read."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dynlora.adapter_files.base_models import load_weights, position_limit, within


def test_a_model_with_tied_weights_has_nothing_drawn(tmp_path):
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2))
    tied.transformer.save_pretrained(tmp_path)
    assert load_weights(AutoModelForCausalLM, str(tmp_path))[1] == frozenset()


def test_a_name_is_within_its_module_and_not_within_its_namesake():
    assert within("bert.pooler.dense.weight", ["bert.pooler"])
    assert within("bert.pooler", ["bert.pooler"])
    assert not within("bert.pooler2.weight", ["bert.pooler"])


@pytest.mark.parametrize(("kind", "limit"), [("bert", 20), ("roberta", 18), ("mpnet", 18)])
def test_a_model_reads_as_many_tokens_as_it_has_positions_for(kind, limit):
    config = AutoConfig.for_model(
        kind, vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    model = AutoModel.from_config(config).eval()
    assert position_limit(model) == limit
    model(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 5))


def test_a_model_of_relative_positions_reads_any_number_of_tokens():
    config = AutoConfig.for_model("t5", vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1)
    assert position_limit(AutoModel.from_config(config)) is None
