"""Adapters that take a part of the base model's weights, and how they give it back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from dynlora.errors import ConfigError
from dynlora.train.config import DataConfig, JobConfig, LoraSettings, ModelConfig
from dynlora.train.methods.prepare import prepare
from dynlora.train.methods.starts import write_difference
from tests.models import bare_llama

TOKENS = torch.tensor([[2, 5, 7, 3]])
PEFT_REMARKS = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False", "ignore:Model has `tie_word_embeddings=True`"
)
STARTS = ("pissa", "pissa_niter_4", "olora")


def job(**lora: Any) -> JobConfig:
    return JobConfig(
        output="o",
        method="lora",
        task="causal_lm",
        model=ModelConfig(name="m"),
        data=DataConfig(name="d"),
        lora=LoraSettings(**{"r": 2, "target_modules": ("q_proj", "down_proj")} | lora),
    )


@torch.no_grad()
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_a_saved_difference_on_the_original_model_is_the_trained_model(
    tmp_path: Path, start: str, use_rslora: bool
) -> None:
    config = job(init_lora_weights=start, use_rslora=use_rslora, modules_to_save=("norm",))
    prepared = prepare(bare_llama(), config, 10)
    original = bare_llama()
    before = prepared.model.eval()(TOKENS).logits
    torch.testing.assert_close(before, original(TOKENS).logits, atol=1e-5, rtol=0)
    moved = [
        not torch.equal(mine.weight, theirs.weight)
        for mine, theirs in zip(_targets(prepared.model), _targets(original), strict=True)
    ]
    assert all(moved), "the base model gave a part away"
    torch.manual_seed(4)
    for parameter in prepared.model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) / 10)
    after = prepared.model(TOKENS).logits
    assert prepared.first is not None
    write_difference(prepared.model, prepared.first, tmp_path / "adapter")
    again = PeftModel.from_pretrained(bare_llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(TOKENS).logits, after, atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 0.01


def _targets(model: Any) -> list[Any]:
    found = {n.removesuffix(".base_layer"): m for n, m in model.named_modules()}
    return [found[name] for name in found if name.endswith(("q_proj", "down_proj"))]


def test_saving_changes_nothing_of_what_is_trained(tmp_path: Path) -> None:
    prepared = prepare(bare_llama(), job(init_lora_weights="pissa"), 10)
    before = {name: t.clone() for name, t in prepared.model.state_dict().items()}
    assert prepared.first is not None
    for _ in range(2):  # the second replaces the first
        write_difference(prepared.model, prepared.first, tmp_path / "adapter")
    assert all(torch.equal(t, before[name]) for name, t in prepared.model.state_dict().items())
    assert prepared.model.peft_config["default"].init_lora_weights == "pissa"
    assert prepared.model.peft_config["default"].r == 2


@pytest.mark.parametrize("start", STARTS)
def test_pissa_takes_the_strongest_part_of_each_weight(start: str) -> None:
    config = job(init_lora_weights=start)
    layers = _targets(prepare(bare_llama(), config, 10).model)
    for layer, plain in zip(layers, _targets(bare_llama()), strict=True):
        weight = plain.weight.detach().double()
        values = torch.linalg.svdvals(weight)
        left = torch.linalg.svdvals(layer.weight.detach().double())
        if start == "olora":
            assert torch.linalg.matrix_rank(weight - layer.weight, atol=1e-5) == 2
        else:
            torch.testing.assert_close(left[:4], values[2:6], rtol=0.1, atol=0)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8, n_inner=16)
    )


@PEFT_REMARKS
@torch.no_grad()
def test_a_transposed_layer_gives_its_part_back_too(tmp_path: Path) -> None:
    config = job(init_lora_weights="pissa", target_modules=("c_attn", "c_proj"))
    prepared = prepare(gpt2(), config, 10)
    for name, parameter in prepared.model.named_parameters():
        if "lora_A" in name:
            parameter.mul_(1.5)
    assert prepared.first is not None
    write_difference(prepared.model, prepared.first, tmp_path / "adapter")
    again = PeftModel.from_pretrained(gpt2(), tmp_path / "adapter").eval()
    expected = prepared.model.eval()(TOKENS).logits
    torch.testing.assert_close(again(TOKENS).logits, expected, atol=1e-5, rtol=0)


@PEFT_REMARKS
@pytest.mark.parametrize(
    ("base", "lora", "told"),
    [
        # peft 0.21 decomposes a transposed weight as if it were not: of a square one, wrongly.
        (gpt2, {"init_lora_weights": "olora", "target_modules": ("c_proj",)}, r"Conv1D .*\(8, 8\)"),
        (bare_llama, {"init_lora_weights": "pissa", "r": 65}, r"lora.r=65 inputs and outputs"),
        (
            gpt2,
            {"init_lora_weights": "pissa", "target_modules": ("lm_head",)},
            "'lm_head', whose weight another module uses too",
        ),
        (
            bare_llama,
            {"init_lora_weights": "pissa", "target_modules": ("embed_tokens",)},
            "got 'model.embed_tokens' of type Embedding",
        ),
    ],
)
def test_a_layer_that_cannot_give_a_part_away_is_refused(
    base: Any, lora: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        prepare(base(), job(**lora), 10)
