"""Weights of base models: whether all are there, and no code runs that lies beside them."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from dynlora.adapter_files.base_models import (
    UnfitWeightsError,
    load_weights,
    position_limit,
    refuse_drawn,
    within,
)
from tests.jobs import save_model
from tests.models import bare_llama
from tests.strange_models import drop_weights, reconfigure


def test_a_whole_model_and_one_with_tied_weights_have_nothing_drawn(tmp_path):
    save_model(tmp_path / "bert")
    form = AutoModelForSequenceClassification
    assert load_weights(form, str(tmp_path / "bert"))[1] == frozenset()
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2))
    tied.transformer.save_pretrained(tmp_path / "gpt2")
    assert load_weights(AutoModelForCausalLM, str(tmp_path / "gpt2"))[1] == frozenset()


def test_what_is_missing_and_what_has_another_shape_is_drawn(tmp_path):
    save_model(tmp_path)
    drop_weights(tmp_path, "bert.pooler.dense.bias")
    form = AutoModelForSequenceClassification
    _, drawn = load_weights(form, str(tmp_path), num_labels=5)
    assert drawn == {"bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_hidden_layers": 3}, r"^9 of its 30 weights .* 'model\.layers\.2\..*saved together"),
        ({"intermediate_size": 8}, r"^6 of its 21 weights .* 'model\.layers\.0\.mlp.*together"),
        ({"hidden_size": 64}, r"^21 of its 21 weights .* 'model\.embed_tokens\.weight'.*another m"),
    ],
)
def test_the_number_of_drawn_weights_and_the_first_are_told(tmp_path, values, told):
    bare_llama().save_pretrained(tmp_path)
    reconfigure(tmp_path, **values)
    model, drawn = load_weights(AutoModelForCausalLM, str(tmp_path))
    with pytest.raises(UnfitWeightsError, match=told):
        refuse_drawn(model, drawn)


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
