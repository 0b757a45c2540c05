"""The base model of a saved adapter: found, loaded with the right head, merged, or refused."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dynlora.adapter_files.adapter_base import attach, check_fits, load_base, locate_base
from dynlora.adapter_files.base_models import load_weights, position_limit, within
from dynlora.adapter_files.merge import merge_adapter
from dynlora.adapter_files.reader import read_adapter
from dynlora.errors import AdapterError
from tests.adapters import change_config, randomised
from tests.gguf_files import save_bogus_gguf, save_gguf
from tests.models import bare_llama
from tests.pictures import SIDE, save_vit
from tests.strange_models import drop_weights

ROBERTA = RobertaConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=16, pad_token_id=1,
)  # fmt: skip
BART = BartConfig(
    vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16,
)  # fmt: skip
TOKENS = ["<|endoftext|>", "<s>", "<pad>", *"abcdefghijkl", "ab"]


def configure(folder, **values):
    change_config(folder, **values)
    return read_adapter(folder)


def save(folder, base, **lora):
    """Save a random adapter and return its model."""
    made = randomised(get_peft_model(base, LoraConfig(r=3, **lora)))
    made.save_pretrained(folder)
    return made


def test_an_untrusted_adapter_does_not_decide_on_downloads(adapter):
    found = configure(adapter, base_model_name_or_path="someone/model")
    with pytest.raises(AdapterError, match=r"names someone/model, which is no folder .*`--model`"):
        locate_base(found, None)
    assert locate_base(found, "someone/other").place == "someone/other"
    for name in ("../../etc", "a/b/c", "", "x" * 300):
        with pytest.raises(AdapterError, match=r"base model must be known"):
            locate_base(configure(adapter, base_model_name_or_path=name), None)


def test_a_class_that_is_no_model_is_never_called(adapter):
    for name in ("os", "Trainer"):
        mapping = {"base_model_class": name, "parent_library": "transformers"}
        found = configure(adapter, task_type=None, auto_mapping=mapping)
        with pytest.raises(AdapterError, match=f"class of transformers, but got '{name}'"):
            load_base(found, locate_base(found, None))


def test_without_a_task_the_class_that_peft_noted_is_taken(model, tmp_path):
    base = BertForSequenceClassification.from_pretrained(model)
    save(tmp_path, base, target_modules=["query"])
    adapter = read_adapter(tmp_path)
    assert adapter.config["task_type"] is None
    assert type(load_base(adapter, locate_base(adapter, None))) is BertForSequenceClassification


def test_tensors_that_peft_would_leave_at_initial_values_are_an_error(adapter):
    found = configure(adapter, target_modules=["query", "value", "dense", "key"])
    with pytest.raises(AdapterError, match=r"must load on its base model.*missing.*key\.lora_A"):
        attach(found.folder, load_base(found, locate_base(found, None)))


def test_an_adapter_on_multihead_attention_is_refused_by_name(tmp_path):
    base = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
    save(tmp_path, copy.deepcopy(base), target_modules=["attn"])
    told = r"ModuleDict has no `weight` in 'attn'"
    with pytest.raises(AdapterError, match=told):
        check_fits(read_adapter(tmp_path), base)


@torch.no_grad()
def test_an_adapter_of_a_gguf_file_is_merged_into_a_plain_folder(tmp_path):
    bare_llama().save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    file = save_gguf(tmp_path / "tiny.gguf", plain, TOKENS)
    given = save(tmp_path / "adapter", plain, target_modules=["q_proj", "up_proj"],
                 task_type="CAUSAL_LM")  # fmt: skip
    tokens = torch.randint(0, 16, (3, 9))
    expected = given(tokens).logits
    adapter = read_adapter(tmp_path / "adapter")
    made = merge_adapter(adapter, locate_base(adapter, str(file)), tmp_path / "made", {})
    assert made == ("tokenizer", True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    assert type(merged) is LlamaForCausalLM
    assert "quantization_config" not in merged.config.to_dict()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "made").convert_ids_to_tokens([3]) == ["a"]


def test_a_gguf_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    save(tmp_path / "adapter", bare_llama(), target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = read_adapter(tmp_path / "adapter")
    for content in (b"", b"GGUF\x03\x00\x00\x00\xff\xff"):
        (tmp_path / "cut.gguf").write_bytes(content)
        with pytest.raises(AdapterError, match=r"cut\.gguf could not be loaded"):
            load_base(adapter, locate_base(adapter, str(tmp_path / "cut.gguf")))
    file = save_bogus_gguf(tmp_path / "odd.gguf")
    with pytest.raises(AdapterError, match=r"odd\.gguf could not be loaded: .*bogus"):
        load_base(adapter, locate_base(adapter, str(file)))


@torch.no_grad()
def test_an_image_model_of_the_hub_is_merged_with_its_preprocessing(tmp_path, monkeypatch):
    save_vit(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    targets = r".*_proj"
    given = save(tmp_path / "adapter", base, target_modules=targets, modules_to_save=["classifier"])
    pixels = torch.randn(2, 3, SIDE, SIDE)
    expected = given(pixels).logits
    cache = tmp_path / "hub" / "models--someone--vit"  # as after a download
    shutil.copytree(tmp_path / "base", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapter = configure(tmp_path / "adapter", base_model_name_or_path="someone/vit")
    source = locate_base(adapter, None)
    assert (source.place, source.options["local_files_only"]) == ("someone/vit", True)
    made = merge_adapter(adapter, source, tmp_path / "made", {})
    assert made == ("image processor", True)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "made").eval()
    torch.testing.assert_close(merged(pixels).logits, expected, rtol=0, atol=1e-5)
    before, after = (
        json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        for name in ("base", "made")
    )
    assert after == before
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    source = locate_base(adapter, str(tmp_path / "base"))
    made = merge_adapter(adapter, source, tmp_path / "without", {})
    assert made == ("image processor", False)


@pytest.mark.parametrize(
    ("form", "config", "head", "outputs"),
    [
        (RobertaForSequenceClassification, ROBERTA, "classifier", 40),
        (BartForSequenceClassification, BART, "classification_head", 5),
    ],
)
def test_a_head_of_several_layers_has_the_outputs_of_its_last(
    form, config, head, outputs, tmp_path
):
    form(config).save_pretrained(tmp_path / "base")
    base = form.from_pretrained(tmp_path / "base", num_labels=outputs, ignore_mismatched_sizes=True)
    save(tmp_path / "adapter", base, target_modules=["q_proj", "query"], modules_to_save=[head])
    adapter = read_adapter(tmp_path / "adapter")
    merge_adapter(adapter, locate_base(adapter, None), tmp_path / "made", {"problem_type": "x"})
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert len(made["id2label"]) == outputs
    assert made["problem_type"] == "x"


def test_weights_that_neither_model_nor_adapter_has_are_an_error(model, adapter, tmp_path):
    base = shutil.copytree(model, tmp_path / "base")
    drop_weights(base, "classifier")
    found = read_adapter(adapter)
    assert load_base(found, locate_base(found, str(base))), "the adapter has the classifier"
    save(tmp_path / "headless", BertForSequenceClassification.from_pretrained(model),
         target_modules=["query"])  # fmt: skip
    headless = read_adapter(tmp_path / "headless")
    with pytest.raises(AdapterError, match=r"2 of its 41 weights .* 'classifier\.weight'"):
        load_base(headless, locate_base(headless, str(base)))
    drop_weights(base, "bert.encoder.layer.1.output")
    with pytest.raises(AdapterError, match=r"4 of its 41 weights .*layer\.1\.output"):
        load_base(found, locate_base(found, str(base)))


def test_a_pooler_that_no_head_reads_may_be_missing(model, tmp_path):
    bare = BertModel.from_pretrained(model)
    save(tmp_path / "adapter", bare, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    base = shutil.copytree(model, tmp_path / "base")
    drop_weights(base, "bert.pooler")
    adapter = read_adapter(tmp_path / "adapter")
    assert load_base(adapter, locate_base(adapter, str(base)))


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
