"""Models and loops that tests build in code: small enough to train in seconds on one core."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from dynlora import DynamicLora, DynamicLoraConfig

VOCABULARY = 16


def bare_llama(*, hidden: int = 32, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """Return a random Llama over 16 tokens: 7 linear layers a block.

    Its weights are three times transformers' default: with its head as small as that the logits
    could not tell 16 tokens apart, whatever the adapter learns.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.06,
    )
    return LlamaForCausalLM(config)


def lora_llama(
    *, r: int = 4, seed: int = 0, adapter_name: str = "default", **lora: object
) -> nn.Module:
    """Return `bare_llama` with LoRA on all its linear layers; `lora_B` is 0, as PEFT makes it."""
    base = bare_llama(seed=seed)
    torch.manual_seed(seed + 1)
    settings = {"lora_alpha": 2 * r, "target_modules": "all-linear"} | lora
    return get_peft_model(base, LoraConfig(r=r, **settings), adapter_name=adapter_name)


WINDOW = {"first_event": 0.15, "last_event": 0.5}
"""When ranks move in runs of a few dozen steps: by the default's 5 % nothing is known yet."""


def bare_bert(*, hidden: int = 48, layers: int = 4, gain: float = 3.0, seed: int = 0) -> BertModel:
    """Return a random BERT with 6 linear layers a block, whose weights are large enough to matter.

    transformers draws weights so small that a layer adds almost nothing to the residual stream.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    model = BertModel(config, add_pooling_layer=False)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "encoder" in name:
            weight.data.mul_(gain)
    return model


def sequences(*, batch: int = 8, length: int = 12, seed: int = 0) -> Iterator[Tensor]:
    """Yield batches of x[t+1] = (5 x[t] + 3) mod 16 from random starts: learnable, and no noise."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = [torch.randint(0, VOCABULARY, (batch,), generator=generator)]
        for _ in range(length - 1):
            tokens.append((5 * tokens[-1] + 3) % VOCABULARY)
        yield torch.stack(tokens, dim=1)


def loss_of(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return the loss of a batch; of tokens alone, as a language model's."""
    given = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch
    return model(**given).loss


def adamw(model: nn.Module, lr: float = 5e-3, **settings: object) -> AdamW:
    """Return AdamW over what can be trained."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    dynamic: DynamicLora | None,
    steps: int,
    batches: Iterator[Any] | None = None,
    after: Callable[[int], None] = lambda step: None,
    *,
    loss: Callable[[nn.Module, Any], Tensor] = loss_of,
) -> list[float]:
    """Train with the two calls, or as plain PEFT without `dynamic`; return the losses.

    `after` is called with the step's number when the step is over, `loss` with model and batch.
    """
    batches = batches or sequences()
    losses = []
    for step in range(1, steps + 1):
        value = loss(model, next(batches))
        value.backward()
        if dynamic is not None:
            dynamic.observe()
        optimizer.step()
        if dynamic is not None:
            dynamic.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        after(step)
    return losses


def attached(model: nn.Module, optimizer: Optimizer, **config: object) -> DynamicLora:
    """Return a controller on the model, whose ranks move in `WINDOW` unless told otherwise."""
    return DynamicLora(model, optimizer, DynamicLoraConfig(**(WINDOW | config)))


def trained(model: nn.Module, steps: int, **config: object) -> tuple[AdamW, DynamicLora]:
    """Train with a new optimizer and a controller `attached`; return both."""
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, **config)
    train(model, optimizer, dynamic, steps)
    return optimizer, dynamic
