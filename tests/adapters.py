"""Adapters saved by stock PEFT, with weights drawn at random, for tests of what reads them."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
)

from tests.models import bare_llama


class Convolutions(nn.Module):
    """An embedding, two convolutions and a linear layer, as no transformer has them together."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 10, (3, 2), stride=2)
        self.head = nn.Linear(10, 5)
        self.config = PretrainedConfig()

    def forward(self, tokens):
        columns = self.conv1(self.embed(tokens).transpose(1, 2))
        grid = torch.relu(columns).unflatten(2, (4, -1))
        return self.head(torch.relu(self.conv2(grid)).mean(dim=(2, 3)))


def bare_gpt2(**settings: object) -> nn.Module:
    """Return a random GPT-2, whose layers hold their weights transposed (`fan_in_fan_out`)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.06, **settings))


def randomised(model: nn.Module, *, seed: int = 1, scale: float = 0.1) -> nn.Module:
    """Give every trainable weight a random value: an untrained adapter adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = scale * torch.randn(weight.shape, generator=generator).to(weight)
    return model.eval()


ALL = {"r": 4, "target_modules": "all-linear"}
PATTERNS = {
    "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp.*": 2, "model.layers.0.self_attn.v_proj": 1},
    "alpha_pattern": {"o_proj": 3, "down_proj": 0.5},
}
CASES = {
    "plain": (bare_llama, ALL | {"lora_alpha": 8}),
    "patterns": (bare_llama, ALL | PATTERNS),
    "rslora": (bare_llama, ALL | PATTERNS | {"lora_alpha": 5, "use_rslora": True}),
    "embedding": (
        bare_llama,
        {"r": 3, "target_modules": ["embed_tokens", "v_proj"], "rank_pattern": {"v_proj": 5}},
    ),
    "head kept": (
        bare_llama,
        {"r": 3, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]},
    ),
    "transposed": (
        bare_gpt2,
        {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True,
         "rank_pattern": {"c_attn": 5}},
    ),
    "convolutions": (
        Convolutions,
        {"r": 3, "target_modules": ["embed", "conv1", "conv2", "head"],
         "rank_pattern": {"conv2": 5}, "lora_alpha": 7},
    ),
    "bias": (
        Convolutions,
        {"r": 3, "target_modules": ["conv2", "head"], "lora_bias": True, "lora_alpha": 7},
    ),
}  # fmt: skip
"""By name, how to make the base model, and what LoRA adds to it."""


def save_adapter(folder: Path, case: str, **settings: object) -> PeftModel:
    """Save the adapter of a case with PEFT and return the model that holds it."""
    make, lora = CASES[case]
    model = randomised(get_peft_model(make(), LoraConfig(**(lora | settings))))
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **values: object) -> None:
    """Change keys of a saved adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_close(made: torch.Tensor, given: torch.Tensor) -> None:
    """Assert that outputs are equal to within 1e-6 of the largest."""
    torch.testing.assert_close(made, given, rtol=0, atol=1e-6 * float(given.abs().max()))


def load_adapter(folder: Path, case: str) -> PeftModel:
    """Load an adapter of a case with PEFT, on a fresh base model."""
    return PeftModel.from_pretrained(CASES[case][0](), folder).eval()


@torch.no_grad()
def outputs(model: nn.Module, *, seed: int = 5) -> torch.Tensor:
    """Return what a model of any case says to random tokens."""
    tokens = torch.randint(0, 11, (4, 12), generator=torch.Generator().manual_seed(seed))
    said = model(tokens)
    return said if isinstance(said, torch.Tensor) else said.logits


def save_classifier_adapter(
    folder: Path, base: Path, *, labels: int = 2, **lora: object
) -> PeftModel:
    """Save an adapter with a classifier of its own on a base model's folder; return the model."""
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, ignore_mismatched_sizes=True
    )
    settings = {
        "r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "dense"],
        "task_type": "SEQ_CLS",
    }  # fmt: skip
    made = randomised(get_peft_model(model, LoraConfig(**settings | lora)))
    made.save_pretrained(folder)
    return made
