"""A base model to PEFT's model around it: what is then saved of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from dynlora.train.config import DataConfig, JobConfig, LoraSettings, ModelConfig
from dynlora.train.methods.adapter import add_adapter
from tests.models import bare_llama

TOKENS = torch.tensor([[2, 5, 7, 3]])


def adapted(**lora: Any) -> Any:
    job = JobConfig(
        output="o",
        method="lora",
        task="causal_lm",
        model=ModelConfig(name="m"),
        data=DataConfig(name="d"),
        lora=LoraSettings(r=2, **lora),
    )
    base = bare_llama()
    base.name_or_path = "someone/model"  # of which nothing is here: PEFT would look on the hub
    return add_adapter(base, job)


@torch.no_grad()
@pytest.mark.parametrize(
    ("lora", "embedding"),
    [
        ({"target_modules": ("embed_tokens", "q_proj")}, ["lora_embedding_A", "lora_embedding_B"]),
        ({"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens",)}, ["weight"]),
        ({"target_modules": ("q_proj",)}, []),
    ],
)
def test_the_embedding_is_saved_as_it_was_trained_and_no_remark_is_made(
    tmp_path: Path, lora: dict[str, Any], embedding: list[str]
) -> None:
    model = adapted(**lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(tmp_path, state_dict=None, is_main_process=True)  # as the Trainer does
    names = load_file(tmp_path / "adapter_model.safetensors")
    found = sorted(name.rpartition("embed_tokens.")[2] for name in names if "embed_tokens" in name)
    assert found == embedding
    again = PeftModel.from_pretrained(bare_llama(), tmp_path).eval()
    assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)
