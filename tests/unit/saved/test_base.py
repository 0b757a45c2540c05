"""The base model of a saved adapter: found, loaded in the form it was trained in, refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from dynlora.errors import AdapterError
from dynlora.saved.adapter import read_adapter
from dynlora.saved.base import attach, load_base, locate_base
from dynlora.saved.merge import merge_adapter
from tests.adapters import randomised, save_classifier_adapter
from tests.gguf_files import save_bogus_gguf, save_gguf
from tests.models import bare_llama

TOKENS = ["<|endoftext|>", "<s>", "<pad>", *"abcdefghijkl", "ab"]


def configure(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return read_adapter(folder)


def save(folder, base, **lora):
    """Save a random adapter and return its model."""
    made = randomised(get_peft_model(base, LoraConfig(r=3, **lora)))
    made.save_pretrained(folder)
    return made


def test_an_adapter_from_elsewhere_does_not_decide_what_is_downloaded(model, tmp_path):
    save_classifier_adapter(tmp_path, model)
    adapter = configure(tmp_path, base_model_name_or_path="someone/model")
    with pytest.raises(AdapterError, match=r"names someone/model, which is no folder .*`--model`"):
        locate_base(adapter, None)
    assert locate_base(adapter, "someone/other").place == "someone/other"
    for name in ("../../etc", "a/b/c", "", "x" * 300):
        with pytest.raises(AdapterError, match=r"base model must be known"):
            locate_base(configure(tmp_path, base_model_name_or_path=name), None)


def test_a_hub_model_that_was_downloaded_before_is_found_and_nothing_else_is(
    model, tmp_path, monkeypatch
):
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((model / "config.json").read_bytes())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    save_classifier_adapter(tmp_path / "adapter", model)
    adapter = configure(tmp_path / "adapter", base_model_name_or_path="someone/model")
    source = locate_base(adapter, None)
    assert source.place == "someone/model"
    assert source.options["local_files_only"] is True


def test_code_that_lies_beside_a_base_model_never_runs(model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    save_classifier_adapter(tmp_path / "adapter", model)
    adapter = read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="base could not be loaded"):
        load_base(adapter, locate_base(adapter, str(base)))
    assert not (tmp_path / "ran").exists()


def test_a_class_that_is_no_model_is_never_called(model, tmp_path):
    save_classifier_adapter(tmp_path, model)
    for name in ("TrainingArguments", "os", "utils.logging", "Trainer"):
        mapping = {"base_model_class": name, "parent_library": "transformers"}
        adapter = configure(tmp_path, task_type=None, auto_mapping=mapping)
        with pytest.raises(AdapterError, match=f"class of transformers, got '{name}'"):
            load_base(adapter, locate_base(adapter, None))


def test_without_a_task_the_class_that_peft_noted_is_taken(model, tmp_path):
    base = BertForSequenceClassification.from_pretrained(model)
    save(tmp_path, base, target_modules=["query"])
    adapter = read_adapter(tmp_path)
    assert adapter.config["task_type"] is None
    assert type(load_base(adapter, locate_base(adapter, None))) is BertForSequenceClassification


def test_tensors_that_peft_would_leave_at_their_first_values_are_an_error(model, tmp_path):
    save_classifier_adapter(tmp_path, model)
    adapter = configure(tmp_path, target_modules=["query", "value", "dense", "key"])
    with pytest.raises(AdapterError, match=r"must load on its base model.*missing.*key\.lora_A"):
        attach(adapter, load_base(adapter, locate_base(adapter, None)))


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
    assert merge_adapter(adapter, locate_base(adapter, str(file)), tmp_path / "made")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    assert type(merged) is LlamaForCausalLM
    assert "quantization_config" not in merged.config.to_dict()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "made").convert_ids_to_tokens([3]) == ["a"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00\xff\xff", b"no gguf"])
def test_a_gguf_file_that_cannot_be_read_is_refused_by_name(content, tmp_path):
    save(tmp_path / "adapter", bare_llama(), target_modules=["q_proj"], task_type="CAUSAL_LM")
    (tmp_path / "cut.gguf").write_bytes(content)
    adapter = read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"cut\.gguf could not be loaded"):
        load_base(adapter, locate_base(adapter, str(tmp_path / "cut.gguf")))


def test_a_gguf_file_of_an_unknown_architecture_is_refused_with_its_name(tmp_path):
    save(tmp_path / "adapter", bare_llama(), target_modules=["q_proj"], task_type="CAUSAL_LM")
    file = save_bogus_gguf(tmp_path / "odd.gguf")
    adapter = read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"odd\.gguf could not be loaded: .*bogus"):
        load_base(adapter, locate_base(adapter, str(file)))


@torch.no_grad()
def test_a_model_of_images_is_merged_with_its_preprocessing(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=32, image_size=8, patch_size=4, num_labels=2)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    base = AutoModelForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    linear = [name for name, m in base.named_modules() if type(m) is torch.nn.Linear]
    targets = [name for name in linear if name != "classifier"]
    given = save(tmp_path / "adapter", base, target_modules=targets, modules_to_save=["classifier"])
    pixels = torch.randn(2, 3, 8, 8)
    expected = given(pixels).logits
    adapter = read_adapter(tmp_path / "adapter")
    assert merge_adapter(adapter, locate_base(adapter, None), tmp_path / "made") is False
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "made").eval()
    torch.testing.assert_close(merged(pixels).logits, expected, rtol=0, atol=1e-5)
    assert (tmp_path / "made" / "preprocessor_config.json").read_text() == "{}"
