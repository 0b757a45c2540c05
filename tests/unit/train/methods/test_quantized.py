"""Quantized models: held in few bits, read by their adapters, refused where that cannot be."""

import importlib.util

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dynlora.errors import ConfigError
from dynlora.train.config import ModelConfig
from dynlora.train.pretrained import load_model, locate
from tests.gguf_files import TOKENS, llama, save_gguf
from tests.jobs import save_model
from tests.language import save_language_model

KINDS = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
IDS = torch.tensor([[6, 9, 7, 11, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("model"), hidden=64)


def load(folder, **held):
    return load_model(AutoModelForCausalLM, locate(ModelConfig(path=str(folder), **held)))


def linear_kinds(model):
    return {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize(("bits", "error"), [("nf4", 0.3), ("int8", 0.05)])
def test_all_linear_layers_but_the_head_are_quantized_and_pass_gradients(folder, bits, error):
    model = load(folder, quantization=bits)
    kinds = linear_kinds(model)
    assert kinds["q_proj"] is kinds["down_proj"] is KINDS[bits]
    assert kinds["lm_head"] is torch.nn.Linear
    assert model.name_or_path == str(folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        whole = load(folder).eval()(IDS).logits
        rounded = adapted.eval()(input_ids=IDS).logits  # int8 layers repack for inference
    assert 0 < float((rounded - whole).norm() / whole.norm()) < error
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    first = model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert first.dtype == torch.float32
    assert float(first.grad.norm()) > 0


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_head_that_ends_with_a_bias_is_kept_whole(tmp_path, bits):
    save_model(tmp_path, hidden=64)
    source = locate(ModelConfig(path=str(tmp_path), quantization=bits))
    model = load_model(AutoModelForSequenceClassification, source, num_labels=2)
    kinds = linear_kinds(model)
    assert kinds["query"] is KINDS[bits]
    assert kinds["classifier"] is torch.nn.Linear
    settings = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    adapted = get_peft_model(model, settings)
    adapted(input_ids=IDS).logits.sum().backward()
    trained = [p for name, p in adapted.named_parameters() if "modules_to_save" in name]
    assert all(float(parameter.grad.norm()) > 0 for parameter in trained)


def test_a_gguf_file_is_restored_and_then_quantized(tmp_path):
    bits = "nf4"
    save_gguf(tmp_path / "m.gguf", llama(), TOKENS)
    llama().save_pretrained(tmp_path / "folder")
    model = load(tmp_path, gguf_file="m.gguf", quantization=bits)
    same = load(tmp_path / "folder", quantization=bits)
    assert linear_kinds(model)["q_proj"] is KINDS[bits]
    assert model.name_or_path == str(tmp_path / "m.gguf")
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS).logits, same.eval()(IDS).logits, atol=1e-5)


def test_without_bitsandbytes_its_extra_is_named(folder, monkeypatch):
    find = importlib.util.find_spec

    def none(name):
        return None if name == "bitsandbytes" else find(name)

    monkeypatch.setattr("dynlora.train.pretrained.find_spec", none)
    with pytest.raises(ConfigError, match=r"`model\.quantization: nf4` .*'dynlora\[quantized\]'"):
        locate(ModelConfig(path=str(folder), quantization="nf4"))
    assert locate(ModelConfig(path=str(folder)))
