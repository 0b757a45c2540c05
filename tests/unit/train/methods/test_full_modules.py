"""Modules trained in full: found, trained and saved in float32, and read again."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertModel,
    CLIPConfig,
    DistilBertConfig,
    GPT2Config,
    ResNetConfig,
    RobertaConfig,
)

from dynlora.errors import ConfigError
from dynlora.train.methods.full_modules import (
    head_modules,
    hold_in_float32,
    linear_layers,
    reload_in_float32,
)
from dynlora.train.methods.prepare import prepare
from tests.jobs import minimal_job, save_model
from tests.models import bare_llama

SMALL = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16,
}  # fmt: skip
ROBERTA = RobertaConfig(**SMALL, pad_token_id=1)
DISTIL = DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
BART = BartConfig(
    vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16,
)  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = CLIPConfig(
    text_config=SMALL | {"projection_dim": 8},
    vision_config=VISION | {"intermediate_size": 32, "image_size": 16, "patch_size": 8},
)
GPT2 = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16)
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")


@pytest.mark.parametrize(
    ("name", "config", "head"),
    [
        ("BertForSequenceClassification", BertConfig(**SMALL), ["classifier"]),
        ("RobertaForSequenceClassification", ROBERTA, ["classifier"]),
        ("DistilBertForSequenceClassification", DISTIL, ["pre_classifier", "classifier"]),
        ("BartForSequenceClassification", BART, ["classification_head"]),
        ("GPT2ForTokenClassification", GPT2, ["classifier"]),
        ("CLIPForImageClassification", CLIP, ["classifier"]),
        ("ResNetForImageClassification", RESNET, ["classifier"]),
    ],
)
def test_the_head_beside_the_pretrained_part_is_trained_whole_and_not_adapted(name, config, head):
    base = getattr(transformers, name)(config)
    assert head_modules(base) == head
    if config in (GPT2, RESNET):
        assert len(linear_layers(base, head)) == 1
        return  # there is no other layer to adapt
    sizes = [p.numel() for n, p in base.named_parameters() if n.partition(".")[0] in head]
    model = prepare(base, minimal_job(method="lora", lora={"r": 2}), 100).model
    named = dict(model.named_parameters())
    of_head = {n: p for n, p in named.items() if n.split(".")[2] in head}
    assert not any("lora_" in n for n in of_head)
    assert any("lora_" in n for n in named)
    assert sorted(p.numel() for p in of_head.values() if p.requires_grad) == sorted(sizes)


def test_a_model_without_a_head_is_refused_by_its_modules():
    with pytest.raises(ConfigError, match="got a BertModel made of embeddings, encoder, pooler"):
        head_modules(BertModel(BertConfig(**SMALL)))


TOKENS = torch.tensor([[2, 5, 7, 3]])


def save_llama(folder):
    bare_llama().save_pretrained(folder)


@pytest.mark.parametrize(
    ("form", "save", "target", "modules"),
    [
        (
            AutoModelForSequenceClassification,
            save_model,
            "query",
            ["classifier", "bert.pooler", "word_embeddings", "LayerNorm"],
        ),
        (AutoModelForCausalLM, save_llama, "q_proj", ["lm_head", "norm"]),
    ],
)
def test_modules_trained_in_full_take_small_steps_in_float32_and_are_read_exactly(
    tmp_path, form, save, target, modules
):
    save(tmp_path / "base")

    def base(dtype=torch.bfloat16):
        return form.from_pretrained(tmp_path / "base", dtype=dtype)

    lora = LoraConfig(r=2, target_modules=[target], modules_to_save=modules)
    assert hold_in_float32(get_peft_model(base(torch.float32), lora)) is False
    model = get_peft_model(base(), lora)
    assert hold_in_float32(model) is True
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    full = {name: p for name, p in trained.items() if "modules_to_save" in name}
    before = {name: p.detach().clone() for name, p in full.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-6)
    logits = model(input_ids=TOKENS).logits
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    optimizer.step()
    for name, parameter in full.items():
        assert float(parameter.grad.norm()) > 0, name
        step = before[name] - 1e-6 * parameter.grad
        assert torch.equal(parameter.detach(), step), name
    for parameter in trained.values():
        parameter.data.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    reload_in_float32(again, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=TOKENS).logits
        assert torch.equal(again.eval()(input_ids=TOKENS).logits, expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())
