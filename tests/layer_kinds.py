"""One small model per kind of layer that LoRA sits on, each with a task that it can learn."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.modeling_outputs import ImageClassifierOutput

from dynlora import DynamicLora
from tests.adapters import bare_gpt2
from tests.models import adamw, attached, bare_llama, sequences

Batch = dict[str, Tensor]


def unchanged(model: nn.Module) -> None:
    """Leave a model as it is."""


@dataclass(frozen=True)
class Case:
    """A base model, the settings of its LoRA, what is done to both, and its data."""

    base: Callable[[], nn.Module]
    lora: dict[str, object]
    batches: Callable[..., Iterator[Batch]]
    layer: str = ""
    """The name of a layer of this kind."""
    prepare: Callable[[nn.Module], object] = unchanged
    """Done to the model once it carries LoRA."""
    optimizer: dict[str, object] = field(default_factory=dict)
    """Settings of AdamW."""

    def model(self, *, r: int = 4, seed: int = 0, **lora: object) -> nn.Module:
        """Return the base with a fresh adapter, as PEFT makes it."""
        base = self.base()
        torch.manual_seed(seed + 1)
        settings = {"lora_alpha": 2 * r} | self.lora | lora
        model = get_peft_model(base, LoraConfig(r=r, **settings))
        self.prepare(model)
        return model.train()

    def load(self, folder: object) -> nn.Module:
        """Return the base with the adapter that a folder holds, as stock PEFT loads it.

        In training mode, because bitsandbytes has another kernel for evaluation.
        """
        model = PeftModel.from_pretrained(self.base(), folder)
        self.prepare(model)
        return model.train()

    def adamw(self, model: nn.Module) -> AdamW:
        """Return AdamW over what is trained."""
        return adamw(model, **({"lr": 1e-2} | self.optimizer))

    def started(self, **settings: object) -> tuple[nn.Module, AdamW, DynamicLora]:
        """Return a model, its optimizer and a controller with these settings."""
        model = self.model()
        optimizer = self.adamw(model)
        return model, optimizer, attached(model, optimizer, **settings)


class Net(nn.Module):
    """Three convolutions of different geometry and a linear head; forwards as transformers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 24, (3, 2), stride=(2, 1), padding="valid")
        self.third = nn.Conv2d(24, 16, 3, padding="same", padding_mode="reflect")
        self.head = nn.Linear(16, 4)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        hidden = self.first(pixel_values).relu()
        hidden = self.second(hidden).relu()
        hidden = self.third(hidden).relu()
        logits = self.head(hidden.mean(dim=(2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def images(*, batch: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Yield gratings under noise, whose direction is the label."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij")
    waves = torch.stack([torch.sin(2 * w) for w in (x, y, x + y, x - y)])
    while True:
        labels = torch.randint(0, 4, (batch,), generator=generator)
        noise = torch.randn(batch, 3, 10, 10, generator=generator)
        yield {"pixel_values": 0.3 * noise + 3 * waves[labels][:, None], "labels": labels}


def texts(*, batch: int = 8, seed: int = 0) -> Iterator[Batch]:
    """Yield `sequences` as a language model takes them."""
    for tokens in sequences(batch=batch, seed=seed):
        yield {"input_ids": tokens, "labels": tokens}


def bare_net() -> nn.Module:
    """Return the convolutions with the same weights each time."""
    torch.manual_seed(0)
    return Net()


def gpt2_without_dropout() -> nn.Module:
    """Return a random GPT-2 without dropout, whose layers are `Conv1D`."""
    return bare_gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


def bare_mixtral() -> nn.Module:
    """Return a random Mixtral of four experts in each of two blocks."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )


def quantised_llama(**settings: object) -> nn.Module:
    """Return a Llama that bitsandbytes quantised as it loaded."""
    pytest.importorskip("bitsandbytes")
    with tempfile.TemporaryDirectory() as folder:
        bare_llama(hidden=64).save_pretrained(folder)
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        )
    model.name_or_path = ""  # the folder is gone
    return model


LAYER = "model.layers.0.self_attn.q_proj"
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj", "v_proj", "down_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
CONVOLUTIONS = {"target_modules": ["first", "second", "third", "head"]}
LINEAR = {"target_modules": "all-linear"}
EXPERTS = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
CASES = {
    "Linear": Case(bare_llama, LINEAR, texts, LAYER),
    "Conv1D": Case(gpt2_without_dropout, CONV1D, texts, "transformer.h.0.attn.c_attn"),
    "Embedding": Case(bare_llama, EMBEDDING, texts, "model.embed_tokens"),
    "Conv2d": Case(bare_net, CONVOLUTIONS, images, "second"),
    "Experts": Case(bare_mixtral, EXPERTS, texts, "model.layers.0.mlp.experts.gate_up_proj"),
    "DoRA": Case(bare_llama, EMBEDDING | {"use_dora": True}, texts, "model.embed_tokens"),
    "bias": Case(bare_net, CONVOLUTIONS | {"lora_bias": True}, images, "second"),
    "NF4": Case(partial(quantised_llama, **NF4), LINEAR, texts, LAYER),
    "int8": Case(partial(quantised_llama, load_in_8bit=True), LINEAR, texts, LAYER),
}
"""By the kind's name; `Linear` is the control."""
