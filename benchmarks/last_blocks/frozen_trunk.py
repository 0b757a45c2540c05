"""A model in two parts: the frozen lower blocks, whose outputs are cached on disk, and the rest.

Adapters sit in the upper blocks only, so that the outputs of the lower ones never change, and a
training step computes only the upper blocks. Logits are computed for the labels of a task alone.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoModelForCausalLM, Dinov2Model
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.resumable.time_limit import TimeLimit

TRUNK_BATCH = 16
EVALUATION_BATCH = 32
IGNORED = -100
"""Label of positions without a loss."""
SIDE = 56
"""Pixels per side of an image."""
IMAGE_POSITIONS = 17
"""The class token and 4 x 4 patches of an image."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs of the trunk, and the label of each position, shortest example first."""

    inputs: Sequence[Any]
    """Token ids without the last one, or an image of uint8 in shape (height, width)."""
    labels: list[list[int]]
    """Index in the task's vocabulary, or `IGNORED`."""

    @property
    def lengths(self) -> Int[Tensor, " examples"]:
        """Positions per example."""
        return torch.tensor([len(labels) for labels in self.labels])

    @property
    def digest(self) -> str:
        """Checksum of the inputs, under which the trunk's outputs are cached."""
        found = sha256(self.lengths.numpy().tobytes())
        for each in self.inputs:
            found.update(np.asarray(each).tobytes())
        return found.hexdigest()[:16]


class SplitModel(Protocol):
    """Both parts of one model."""

    def student(self) -> nn.Module:
        """Return a copy of the upper part."""

    def head(self, vocabulary: list[int]) -> Float[Tensor, "labels size"]:
        """Return the output weights of these labels; they require gradients if they are trained."""

    def states(self, inputs: Sequence[Any]) -> list[Float[Tensor, "positions size"]]:
        """Return the trunk's output for each of a few inputs."""


class Decoder:
    """A language model."""

    def __init__(self, folder: Path, blocks: int) -> None:
        """Load the model.

        Args:
            folder: Folder of a Llama model in float32.
            blocks: Number of upper blocks that can be trained.
        """
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.vocabulary: Tensor = whole.lm_head.weight.detach()
        self.trunk = whole.model.eval()
        self.upper = copy.copy(self.trunk)
        self.upper._modules = dict(self.trunk._modules)
        self.upper.config = copy.deepcopy(self.trunk.config)
        layers = self.trunk.layers
        self.upper.layers, self.trunk.layers = layers[-blocks:], layers[:-blocks]
        self.upper.embed_tokens, self.trunk.norm = nn.Identity(), nn.Identity()
        self.upper.config.num_hidden_layers = blocks
        self.trunk.config.num_hidden_layers = len(layers) - blocks
        skip_unasked(self.upper)

    def student(self) -> nn.Module:
        """Return a copy of the upper part."""
        return copy.deepcopy(self.upper)

    def head(self, vocabulary: list[int]) -> Float[Tensor, "labels size"]:
        """Return the frozen output embeddings of some tokens."""
        return self.vocabulary[vocabulary]

    def states(self, inputs: Sequence[Sequence[int]]) -> list[Float[Tensor, "tokens size"]]:
        """Return the trunk's output for every token of some texts."""
        longest = max(map(len, inputs))
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in inputs])
        # Padding follows the text, so that causal attention never reads it.
        found = self.trunk(input_ids=padded, use_cache=False).last_hidden_state
        return [states[: len(ids)] for states, ids in zip(found, inputs, strict=True)]


class VisionTransformer:
    """A model of images, whose head of zeros is trained."""

    def __init__(self, folder: Path, blocks: int) -> None:
        """Load the model.

        Args:
            folder: Folder that `benchmarks.models.dinov2_from_onnx` wrote.
            blocks: Number of upper blocks that can be trained.
        """
        whole: Any = Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
        size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
        self.processor = AutoImageProcessor.from_pretrained(folder, size=size, crop_size=crop)
        self.upper = UpperBlocks(whole.encoder.layer[-blocks:], whole.layernorm)
        whole.encoder.layer, whole.layernorm = whole.encoder.layer[:-blocks], nn.Identity()
        self.trunk = whole
        skip_unasked(self.upper)

    def student(self) -> nn.Module:
        """Return a copy of the upper part."""
        return copy.deepcopy(self.upper)

    def head(self, vocabulary: list[int]) -> Float[Tensor, "labels size"]:
        """Return zeros to train."""
        return torch.zeros(len(vocabulary), self.trunk.config.hidden_size, requires_grad=True)

    def states(self, inputs: Sequence[np.ndarray]) -> list[Float[Tensor, "positions size"]]:
        """Return the trunk's output for the class token and every patch of some images."""
        images = [np.repeat(image[..., None], 3, axis=-1) for image in inputs]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        return [*self.trunk(pixel_values=pixels).last_hidden_state]


class UpperBlocks(nn.Module):
    """The upper part of a vision transformer, with the arguments of a decoder's."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.layers, self.norm = layers, norm

    def forward(self, inputs_embeds: Tensor, **_: Any) -> BaseModelOutput:
        """Return the normalized output of the last block; images need no mask."""
        states = inputs_embeds
        for layer in self.layers:
            states = layer(states)
        return BaseModelOutput(last_hidden_state=self.norm(states))


@torch.no_grad()
def write_states(model: SplitModel, examples: Examples, path: Path, limit: TimeLimit) -> None:
    """Write the trunk's output for every position to a file, continuing a killed call.

    Args:
        model: The model.
        examples: Examples whose positions are written one after another, as float32.
        path: File, named `*.partial` until it is complete.
        limit: Time limit, checked before each batch.

    Raises:
        TimeUpError: If the time is up.
    """
    partial = path.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum(examples.lengths.numpy())
    size = model.head([0]).shape[1] * 4
    written = partial.stat().st_size // size if partial.exists() else 0
    done = int(np.searchsorted(ends, written, side="right"))
    done -= done % TRUNK_BATCH  # rounding depends on the batch
    with partial.open("ab") as file:
        file.truncate(int(ends[done - 1]) * size if done else 0)
        for start in range(done, len(ends), TRUNK_BATCH):
            limit.check()
            for states in model.states(examples.inputs[start : start + TRUNK_BATCH]):
                file.write(states.numpy().tobytes())
    partial.rename(path)


class CachedExamples:
    """Examples with the trunk's outputs on disk."""

    def __init__(self, examples: Examples, path: Path, size: int) -> None:
        """Open the file of outputs.

        Args:
            examples: Its examples, in the same order.
            path: File that `write_states` wrote.
            size: Numbers per position.

        Raises:
            ValueError: If the file has another number of positions.
        """
        self.examples = examples
        self.lengths = examples.lengths
        self._starts = np.cumsum([0, *self.lengths.tolist()])
        self._states = np.memmap(path, dtype=np.float32, mode="r").reshape(-1, size)
        if len(self._states) != self._starts[-1]:
            raise ValueError(
                f"{path} must have {self._starts[-1]} positions, but got {len(self._states)}. "
                "Delete it."
            )

    def batch(
        self, rows: Sequence[int]
    ) -> tuple[dict[str, Tensor], Int[Tensor, "examples positions"]]:
        """Return the upper part's inputs and the labels; padding has none."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        states = torch.zeros(len(rows), longest, self._states.shape[1])
        labels = torch.full((len(rows), longest), IGNORED)
        for place, row in enumerate(rows):
            start, length = self._starts[row], int(lengths[place])
            states[place, :length] = torch.from_numpy(self._states[start : start + length].copy())
            labels[place, :length] = torch.tensor(self.examples.labels[row])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"inputs_embeds": states, "attention_mask": mask}, labels


def skip_unasked(upper: Any) -> None:
    """Compute the last feed-forward part only where its attribute `asked` is true.

    Its output at other positions is never read.
    """

    def gather(part: Any, arguments: tuple[Tensor, ...]) -> Tensor:
        return arguments[0][part.asked]

    def scatter(part: Any, _: Any, output: Tensor) -> Tensor:
        full = output.new_zeros(*part.asked.shape, output.shape[-1])
        full[part.asked] = output
        return full

    part = upper.layers[-1].mlp
    part.register_forward_pre_hook(gather)
    part.register_forward_hook(scatter)


def logits_of(
    model: Any,
    inputs: Mapping[str, Tensor],
    asked: Bool[Tensor, "examples positions"],
    head: Float[Tensor, "labels size"],
) -> Float[Tensor, "asked labels"]:
    """Return the logits of the task's labels at some positions."""
    model.layers[-1].mlp.asked = asked
    return model(**inputs, use_cache=False).last_hidden_state[asked] @ head.T


def loss_of(
    model: nn.Module, data: CachedExamples, rows: Sequence[int], head: Tensor
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over the labels of some examples."""
    inputs, labels = data.batch(rows)
    asked = labels != IGNORED
    return cross_entropy(logits_of(model, inputs, asked, head), labels[asked])


class Judged(NamedTuple):
    """What a model gives for some examples."""

    loss: float
    """Mean cross-entropy over labels."""
    exact: float
    """Share of examples with no wrong label."""
    answers: int
    """Number of different labels given."""


@torch.no_grad()
def answers(
    model: nn.Module, data: CachedExamples, head: Tensor
) -> Iterator[tuple[Int[Tensor, " rows"], Bool[Tensor, "rows positions"], Tensor, Tensor]]:
    """Yield rows of similar length, where they have labels, and the logits and labels there."""
    model.eval()
    for rows in data.lengths.argsort(stable=True).split(EVALUATION_BATCH):
        inputs, labels = data.batch(rows.tolist())
        asked = labels != IGNORED
        yield rows, asked, logits_of(model, inputs, asked, head), labels[asked]


def evaluate(model: nn.Module, data: CachedExamples, head: Tensor) -> Judged:
    """Judge a model by some examples."""
    total, count, right = 0.0, 0, 0
    given = torch.zeros(len(head), dtype=torch.bool)
    for _, asked, logits, labels in answers(model, data, head):
        total += float(cross_entropy(logits, labels, reduction="sum"))
        count += len(logits)
        wrong, found = torch.zeros_like(asked), logits.argmax(dim=1)
        wrong[asked] = found != labels
        right += int((~wrong.any(dim=1)).sum())
        given[found] = True
    return Judged(total / count, right / len(data.lengths), int(given.sum()))
