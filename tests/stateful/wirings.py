"""Tiny models of several wirings, and what a test may change in the middle of their forwards."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 11
Change = Callable[[Tensor], AbstractContextManager[None]]


def nothing(inputs: Tensor) -> AbstractContextManager[None]:
    return nullcontext()


class Tiny(nn.Module):
    """Reads two batches of ids, `tokens` and `said`; a subclass wires its layers."""

    layers: tuple[str, ...]
    """Layers from the model's width to its width."""
    lora: tuple[str, ...]
    """Layers that carry an adapter."""
    causal = False

    def __init__(self, width: int):
        super().__init__()
        torch.default_generator.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, width)
        for name in self.layers:
            self.add_module(name, nn.Linear(width, width))
        self.head = nn.Linear(width, VOCABULARY)
        self.skipped: frozenset[str] = frozenset()
        self.between: Change = nothing
        """Called with a tensor once a first layer has read it, around those that read it next."""
        self.checkpointing = "off"

    def forward(self, tokens: Tensor, said: Tensor) -> Tensor:
        x, y = self.embed(tokens), self.embed(said)
        body = partial(self.run, self.skipped, self.between)
        if self.checkpointing == "off" or not (self.training and torch.is_grad_enabled()):
            return self.head(body(x, y))
        reentrant = self.checkpointing == "reentrant"
        x.requires_grad_(reentrant)
        return self.head(checkpoint(body, x, y, use_reentrant=reentrant))

    def run(self, skipped: frozenset[str], change: Change, x: Tensor, y: Tensor) -> Tensor:
        """Return the body's output: the same when checkpointing runs it again."""
        self.skipped, self.between = skipped, change
        try:
            return self.body(x, y)
        finally:
            self.between = nothing

    def use(self, name: str, x: Tensor) -> Tensor:
        return x if name in self.skipped else self.get_submodule(name)(x)

    def attend(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.use("q", x)
        with self.between(memory):
            k, v = self.use("k", memory), self.use("v", memory)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return x + scores.softmax(-1) @ v

    @torch.no_grad()
    def generate(self, tokens: Tensor) -> Tensor:
        for _ in range(3):
            following = self(tokens, tokens)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
        return tokens


class Encoder(Tiny):
    layers, lora = ("first", "q", "k", "v"), ("q", "k", "v", "head")

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.use("first", x).tanh()
        return self.attend(h, h)


class Decoder(Encoder):
    lora, causal = ("first", "q", "k", "v"), True


class EncoderDecoder(Tiny):
    layers, lora = ("encode", "q", "k", "v"), ("encode", "k", "v", "head")

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attend(y, self.use("encode", x).tanh())


class TwoTowers(Tiny):
    layers, lora = ("left", "right"), ("left", "right", "head")

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        return self.use("left", x).tanh() * self.use("right", y).tanh()


class Shared(Tiny):
    """One layer reads one tensor twice, and another tensor."""

    layers, lora = ("q", "k"), ("q", "k", "head")

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.use("q", x)
        with self.between(x):
            k, again = self.use("k", x), self.use("q", x)
        return q.tanh() * k + again * self.use("q", y).tanh()


WIRINGS = {kind.__name__: kind for kind in (Encoder, Decoder, EncoderDecoder, TwoTowers, Shared)}


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    base = model.get_base_model()
    return {name: base.get_submodule(name) for name in base.lora}


@contextmanager
def other_adapter(model: PeftModel, inputs: Tensor) -> Iterator[None]:
    active = model.active_adapter
    model.set_adapter("other" if "other" in model.peft_config else active)
    try:
        yield
    finally:  # what checkpointing runs again it may leave early, by an exception
        model.set_adapter(active)


@contextmanager
def other_scale(model: PeftModel, inputs: Tensor) -> Iterator[None]:
    lora_layers(model)["k"].scale_layer(2.0)
    try:
        yield
    finally:
        lora_layers(model)["k"].scale_layer(0.5)


def change_weights(model: PeftModel) -> None:
    with torch.no_grad():
        lora_layers(model)["k"].lora_B["default"].weight.neg_()


def replace_weights(model: PeftModel) -> None:
    weight = lora_layers(model)["k"].lora_B["default"].weight
    weight.data = -weight.data


def replace_inputs(inputs: Tensor) -> None:
    inputs.data = 2 * inputs.data


AROUND: dict[str, Callable[[PeftModel, Tensor], AbstractContextManager[None]]] = {
    "nothing": lambda model, inputs: nullcontext(),
    "no_grad": lambda model, inputs: torch.no_grad(),
    "disable_adapter": lambda model, inputs: model.disable_adapter(),
    "set_adapter": other_adapter,
    "scale_layer": other_scale,
}
"""Changes that are taken back, so that a forward that checkpointing runs again is the same."""
LASTING: dict[str, Callable[[PeftModel, Tensor], object]] = {
    "weights in place": lambda model, inputs: change_weights(model),
    "weights.data": lambda model, inputs: replace_weights(model),
    "inputs in place": lambda model, inputs: inputs.mul_(2),
    "inputs.data": lambda model, inputs: replace_inputs(inputs),
}


def between(model: PeftModel, change: str, inputs: Tensor) -> AbstractContextManager[None]:
    """Make a change in the middle of a forward."""
    if change in AROUND:
        return AROUND[change](model, inputs)
    LASTING[change](model, inputs)
    return nullcontext()
