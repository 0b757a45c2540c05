"""What is trained whole in a model of half precision is held, saved and read in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dynlora.train.methods.precision import hold_in_float32, reload_in_float32
from tests.jobs import save_model
from tests.models import bare_llama

TOKENS = torch.tensor([[2, 5, 7, 3]])
CASES = {
    "head": (AutoModelForSequenceClassification, {"modules_to_save": ["classifier"]}),
    "inside": (
        AutoModelForSequenceClassification,
        {"modules_to_save": ["classifier", "bert.pooler", "word_embeddings", "LayerNorm"]},
    ),
    "output layer": (AutoModelForCausalLM, {"modules_to_save": ["lm_head", "norm"]}),
}


def base_of(form: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    if not (folder / "config.json").is_file():
        if form is AutoModelForCausalLM:
            bare_llama().save_pretrained(folder)
        else:
            save_model(folder)
    return form.from_pretrained(folder, dtype=dtype)


def adapted(base: Any, lora: dict[str, Any]) -> Any:
    targets = ["query"] if hasattr(base, "bert") else ["q_proj"]
    return get_peft_model(base, LoraConfig(r=2, target_modules=targets, **lora))


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_is_float32_and_takes_small_steps(tmp_path: Path, case: str) -> None:
    form, lora = CASES[case]
    model = adapted(base_of(form, tmp_path), lora)
    assert hold_in_float32(model) is True
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    whole = {name: p for name, p in trained.items() if "modules_to_save" in name}
    before = {name: p.detach().clone() for name, p in whole.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-6)
    logits = model(input_ids=TOKENS).logits
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    optimizer.step()
    for name, parameter in whole.items():
        assert float(parameter.grad.norm()) > 0, name
        step = before[name] - 1e-6 * parameter.grad
        assert torch.equal(parameter.detach(), step), name


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_is_read_exactly(tmp_path: Path, case: str) -> None:
    form, lora = CASES[case]
    model = adapted(base_of(form, tmp_path / "base"), lora)
    hold_in_float32(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    again = PeftModel.from_pretrained(base_of(form, tmp_path / "base"), tmp_path / "adapter")
    reload_in_float32(again, tmp_path / "adapter")
    expected = model.eval()(input_ids=TOKENS).logits
    assert torch.equal(again.eval()(input_ids=TOKENS).logits, expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())


@torch.no_grad()
def test_a_model_in_float32_is_left_as_it_is(tmp_path: Path) -> None:
    form, lora = CASES["inside"]
    model = adapted(base_of(form, tmp_path, torch.float32), lora)
    assert hold_in_float32(model) is False
    assert not any(module._forward_pre_hooks for module in model.modules())
