"""Small models that are wired as few are, each with a task that it can learn."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.layer_kinds import EMBEDDING, LINEAR, Batch, Case, texts
from tests.models import bare_llama

CLASSES = 4
WIDTH = 8


class Classifier(nn.Module):
    """Classifies vectors; what is weird is before `mix`, which has room for more than its rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.build()
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def build(self) -> None:
        self.first = nn.Linear(WIDTH, 16)

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.first(inputs)

    def forward(
        self, inputs: Tensor, labels: Tensor | None = None, **more: Tensor
    ) -> SequenceClassifierOutput:
        logits = self.head(self.mix(self.hidden(inputs, **more).relu()).relu())
        loss = None
        if labels is not None:  # the mean over the batch, and 0 for one without examples
            loss = cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def points(*, batch: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Yield vectors whose label a fixed matrix tells."""
    matrix = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    while True:
        inputs = torch.randn(batch, WIDTH, generator=generator)
        yield {"inputs": inputs, "labels": (inputs @ matrix).argmax(dim=1)}


class Twins(Classifier):
    """One encoder reads the two halves of an example, which lie in spaces of their own."""

    def build(self) -> None:
        self.encode = nn.Linear(2 * WIDTH, 16)

    def hidden(self, inputs: Tensor) -> Tensor:
        nothing = torch.zeros_like(inputs)
        left = self.encode(torch.cat([inputs, nothing], dim=-1))
        right = self.encode(torch.cat([nothing, inputs], dim=-1))
        return left + right.tanh()


class Block(nn.Module):
    """Two layers around which the input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.up(hidden).relu())


class Recurrent(Classifier):
    """One block under three names, as in ALBERT."""

    def build(self) -> None:
        self.first = nn.Linear(WIDTH, 16)
        self.blocks = nn.ModuleList([Block()] * 3)

    def hidden(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Routed(Classifier):
    """Four experts, of which an example sees one; those that no example sees are not run."""

    def build(self) -> None:
        self.first = nn.Linear(WIDTH, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def hidden(self, inputs: Tensor, route: Tensor) -> Tensor:
        seen = self.first(inputs).relu()
        hidden = torch.zeros_like(seen)
        for index in route.unique().tolist():
            rows = (route == index).nonzero().flatten()
            hidden = hidden.index_add(0, rows, self.experts[index](seen[rows]))
        return hidden


def routed_points(*, batch: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Yield `points` of which a step's all see two experts, by turns; never the last expert."""
    for step, found in enumerate(points(batch=batch, seed=seed)):
        yield found | {"route": (torch.arange(batch) % 2 + step) % 3}


class Bottleneck(Classifier):
    """Beside a layer, one that writes fewer features than its rank, and one that reads fewer."""

    def build(self) -> None:
        self.first = nn.Linear(WIDTH, 16)
        self.narrow = nn.Linear(WIDTH, 3)
        self.widen = nn.Linear(3, 16)

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.first(inputs) + self.widen(self.narrow(inputs))


class Uneven(nn.Module):
    """Next word of a large vocabulary: an embedding and a head that cost 30 times the others."""

    WORDS = 1200

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(self.WORDS, 16)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 16)
        self.head = nn.Linear(16, self.WORDS)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.head(self.second(self.first(self.embed(inputs)).relu()))
        loss = None if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SequenceClassifierOutput(loss=loss, logits=logits)


def words(*, batch: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Yield single words with the one that follows each; 64 of them occur."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        inputs = torch.randint(0, 64, (batch, 1), generator=generator)
        yield {"inputs": inputs, "labels": (5 * inputs + 3) % 64}


short_llama = partial(bare_llama, layers=1)


def tied_llama() -> nn.Module:
    """Return a Llama whose head is its embedding."""
    base = short_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return base


def freeze_first_block(model: nn.Module) -> None:
    """Let the adapters of the first block stay as they are."""
    for name, parameter in model.named_parameters():
        if "layers.0." in name:
            parameter.requires_grad_(False)


TIED = {**EMBEDDING, "ensure_weight_tying": False}
TIED["target_modules"] = [*EMBEDDING["target_modules"], "lm_head"]
CASES = {
    "tied weights": Case(tied_llama, TIED, texts),
    "shared layers": Case(Recurrent, {"target_modules": ["first", "up", "down", "mix"]}, points),
    "used twice": Case(Twins, {"target_modules": ["encode", "mix"]}, points),
    "no gradient in some steps": Case(
        Routed, {"target_modules": r"first|experts\.\d|mix"}, routed_points, optimizer={"lr": 2e-2}
    ),
    "frozen layers": Case(bare_llama, LINEAR, texts, prepare=freeze_first_block),
    "narrower than the rank": Case(
        Bottleneck, {"target_modules": ["first", "narrow", "widen", "mix"]}, points
    ),
    "unequal cost": Case(Uneven, {"target_modules": ["embed", "first", "second", "head"]}, words),
    "bfloat16": Case(short_llama, LINEAR, texts, prepare=nn.Module.bfloat16),
    # Adam's usual epsilon is 0 in float16, with or without dynlora.
    "float16": Case(short_llama, LINEAR, texts, prepare=nn.Module.half, optimizer={"eps": 1e-4}),
    "bfloat16 under float32": Case(lambda: short_llama().bfloat16(), LINEAR, texts),
}
"""By what is weird about them."""


def parts(batch: Batch, sizes: list[int]) -> list[Batch]:
    """Return a batch cut into parts of these sizes, 0 included."""
    ends = list(itertools.accumulate(sizes))
    return [
        {key: value[end - size : end] for key, value in batch.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]
