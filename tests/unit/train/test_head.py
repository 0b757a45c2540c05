"""Which modules of a model are its head, and what PEFT does with them."""

from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BertConfig,
    CLIPConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ResNetConfig,
    RobertaConfig,
    ViTConfig,
)

from dynlora.errors import ConfigError
from dynlora.train.config import DataConfig, JobConfig, LoraSettings, ModelConfig
from dynlora.train.methods.head import head_modules, linear_layers, no_head
from dynlora.train.methods.prepare import prepare

SMALL: dict[str, Any] = {
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
VIT = ViTConfig(**VISION, intermediate_size=32, image_size=16, patch_size=8)


def build(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(config)


@pytest.mark.parametrize(
    ("name", "config", "head", "linear"),
    [
        ("BertForSequenceClassification", BertConfig(**SMALL), ["classifier"], ["classifier"]),
        ("BertForTokenClassification", BertConfig(**SMALL), ["classifier"], ["classifier"]),
        (
            "RobertaForSequenceClassification",
            ROBERTA,
            ["classifier"],
            ["classifier.dense", "classifier.out_proj"],
        ),
        (
            "DistilBertForSequenceClassification",
            DISTIL,
            ["pre_classifier", "classifier"],
            ["pre_classifier", "classifier"],
        ),
        (
            "BartForSequenceClassification",
            BART,
            ["classification_head"],
            ["classification_head.dense", "classification_head.out_proj"],
        ),
        ("LlamaForSequenceClassification", LlamaConfig(**SMALL), ["score"], ["score"]),
        (
            "GPT2ForTokenClassification",
            GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16),
            ["classifier"],
            ["classifier"],
        ),
        ("ViTForImageClassification", VIT, ["classifier"], ["classifier"]),
        ("CLIPForImageClassification", CLIP, ["classifier"], ["classifier"]),
        (
            "ResNetForImageClassification",
            ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"),
            ["classifier"],
            ["classifier.1"],
        ),
    ],
)
def test_the_head_is_what_stands_beside_the_pretrained_part(
    name: str, config: Any, head: list[str], linear: list[str]
) -> None:
    model = build(name, config)
    assert head_modules(model) == head
    assert linear_layers(model, head) == linear


def test_a_model_without_a_head_is_refused_by_its_modules() -> None:
    with pytest.raises(ConfigError, match="got a BertModel made of embeddings, encoder, pooler"):
        head_modules(build("BertModel", BertConfig(**SMALL)))
    assert no_head(build("BertModel", BertConfig(**SMALL))) == []


@pytest.mark.parametrize("method", ["lora", "adalora", "dynamic"])
@pytest.mark.parametrize(
    ("task", "name", "config"),
    [
        ("sequence_classification", "RobertaForSequenceClassification", ROBERTA),
        ("sequence_classification", "DistilBertForSequenceClassification", DISTIL),
        ("regression", "BartForSequenceClassification", BART),
        ("token_classification", "BertForTokenClassification", BertConfig(**SMALL)),
    ],
)
def test_every_weight_of_the_head_is_trained_whole_and_none_is_adapted(
    task: Any, name: str, config: Any, method: Any
) -> None:
    base = build(name, config)
    heads = head_modules(base)
    sizes = {n: p.numel() for n, p in base.named_parameters() if n.partition(".")[0] in heads}
    job = JobConfig(
        output="out",
        task=task,
        method=method,
        model=ModelConfig(name="m"),
        data=DataConfig(name="d"),
        lora=LoraSettings(r=2),
    )
    model = prepare(base, job, 100).model
    named = dict(model.named_parameters())
    inside = {
        n: p.requires_grad
        for n, p in named.items()
        if n.split("base_model.model.")[1].partition(".")[0] in heads
    }
    assert not any("lora_" in n for n in inside)
    trained = [named[n].numel() for n, trains in inside.items() if trains]
    assert sorted(trained) == sorted(sizes.values())
    assert any("lora_" in n for n in named)
