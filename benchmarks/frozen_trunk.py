"""A decoder in two parts: the frozen lower blocks, whose outputs are cached on disk, and the rest.

Adapters sit in the upper blocks only, so that the outputs of the lower ones never change, and a
training step computes only the upper blocks. Logits are computed for the tokens of a task alone.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks.time_limit import TimeLimit

TRUNK_BATCH = 16
EVALUATION_BATCH = 32
IGNORED = -100
"""Label of positions without a loss."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Token ids without the last one, and the label of each position, shortest example first."""

    ids: list[list[int]]
    labels: list[list[int]]
    """Index in the task's vocabulary of the following token, or `IGNORED`."""

    @property
    def lengths(self) -> Int[Tensor, " examples"]:
        """Tokens per example."""
        return torch.tensor([len(ids) for ids in self.ids])


class Decoder:
    """Both parts of one decoder."""

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

    def student(self) -> nn.Module:
        """Return a copy of the upper part."""
        return copy.deepcopy(self.upper)

    @torch.no_grad()
    def write_states(self, examples: Examples, path: Path, limit: TimeLimit) -> None:
        """Write the trunk's output for every token to a file of float32, continuing a killed call.

        Args:
            examples: Examples whose tokens are written one after another.
            path: File, named `*.partial` until it is complete.
            limit: Time limit, checked before each batch.

        Raises:
            TimeUpError: If the time is up.
        """
        partial = path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        ends = np.cumsum([len(ids) for ids in examples.ids])
        size = self.vocabulary.shape[1] * 4
        written = partial.stat().st_size // size if partial.exists() else 0
        done = int(np.searchsorted(ends, written, side="right"))
        done -= done % TRUNK_BATCH  # rounding depends on the batch
        with partial.open("ab") as file:
            file.truncate(int(ends[done - 1]) * size if done else 0)
            for start in range(done, len(ends), TRUNK_BATCH):
                limit.check()
                for states in self._states(examples.ids[start : start + TRUNK_BATCH]):
                    file.write(states.numpy().tobytes())
        partial.rename(path)

    def _states(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        longest = max(map(len, ids))
        padded = torch.tensor([[*some, *[0] * (longest - len(some))] for some in ids])
        # Padding follows the text, so that causal attention never reads it.
        found = self.trunk(input_ids=padded, use_cache=False).last_hidden_state
        return [states[: len(some)] for states, some in zip(found, ids, strict=True)]


class CachedExamples:
    """Examples with the trunk's outputs on disk."""

    def __init__(self, examples: Examples, path: Path, size: int) -> None:
        """Open the file of outputs.

        Args:
            examples: Its examples, in the same order.
            path: File that `Decoder.write_states` wrote.
            size: Numbers per token.
        """
        self.examples = examples
        self.lengths = examples.lengths
        self._starts = np.cumsum([0, *self.lengths.tolist()])
        self._states = np.memmap(path, dtype=np.float32, mode="r").reshape(-1, size)

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Int[Tensor, " positions"]]:
        """Return the upper part's inputs, and the labels of all positions, padding included."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        states = torch.zeros(len(rows), longest, self._states.shape[1])
        labels = torch.full((len(rows), longest), IGNORED)
        for place, row in enumerate(rows):
            start, length = self._starts[row], int(lengths[place])
            states[place, :length] = torch.from_numpy(self._states[start : start + length].copy())
            labels[place, :length] = torch.tensor(self.examples.labels[row])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"inputs_embeds": states, "attention_mask": mask}, labels.flatten()


def logits_of(
    model: nn.Module, inputs: Mapping[str, Tensor], head: Float[Tensor, "tokens size"]
) -> Float[Tensor, "positions tokens"]:
    """Return the logits of the task's tokens at every position."""
    states = model(**inputs, use_cache=False).last_hidden_state
    return states.flatten(0, 1) @ head.T


def loss_of(
    model: nn.Module, data: CachedExamples, rows: Sequence[int], head: Tensor
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over the labels of some examples."""
    inputs, labels = data.batch(rows)
    states = model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    asked = labels != IGNORED
    return cross_entropy(states[asked] @ head.T, labels[asked])


@torch.no_grad()
def evaluate(model: nn.Module, data: CachedExamples, head: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy over labels, and the share of examples with no wrong label."""
    model.eval()
    total, count, right = 0.0, 0, 0
    for some in data.lengths.argsort(stable=True).split(EVALUATION_BATCH):
        inputs, labels = data.batch(some.tolist())
        logits = logits_of(model, inputs, head)
        asked = labels != IGNORED
        total += float(cross_entropy(logits[asked], labels[asked], reduction="sum"))
        count += int(asked.sum())
        wrong = asked & (logits.argmax(dim=1) != labels)
        right += int((~wrong.reshape(len(some), -1).any(dim=1)).sum())
    return total / count, right / len(data.lengths)
