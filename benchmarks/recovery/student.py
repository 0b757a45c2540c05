"""The recovery task as a plain loop: targets in memory, batches by length, one student per run.

The student is the first blocks of MiniLM-L6, and learns the embeddings of the whole model. The loop
repeats the job of `studies/recovery.yaml` in float32, without a Trainer and without run folders.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss
from transformers import AutoModel, AutoTokenizer

from benchmarks.data import derive
from dynlora.train.tasks.sequence import mean_of_tokens

BATCH = 32
EVALUATION_BATCH = 100


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of texts, padded with 0."""

    ids: Int[Tensor, "texts tokens"]
    lengths: Int[Tensor, " texts"]

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """Return the model's inputs for some texts, padded to the longest of them."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": self.ids[rows, :longest], "attention_mask": mask}


@dataclass(frozen=True, slots=True)
class Split:
    """Texts and the vectors to learn."""

    texts: Texts
    targets: Float[Tensor, "texts size"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two texts per row, and their similarity judged by people."""

    first: Texts
    second: Texts
    scores: list[float]


class Recovery:
    """Base model and data of one task."""

    def __init__(self, task: str, data: Path, cache: Path) -> None:
        """Load everything, and derive the task if the cache lacks it.

        Args:
            task: Name in `derive.TEXTS`.
            data: Folder of the public data sets, with sst2, qqp, qnli and stsb.
            cache: Folder for the derived task.
        """
        if not (cache / task / "test.parquet").exists():
            derive.recovery(data, cache)
        self.tokenizer = AutoTokenizer.from_pretrained(derive.minilm())
        self.base = small_model()
        self.splits = {split: self._read(cache / task, split) for split in derive.SPLITS}
        self.pairs = self._read_pairs(data / "stsb" / "test.parquet")

    def student(self) -> nn.Module:
        """Return a new copy of the base model."""
        return copy.deepcopy(self.base)

    def _tokenize(self, texts: list[str]) -> Texts:
        found = self.tokenizer(texts, truncation=True, max_length=derive.LENGTH)["input_ids"]
        lengths = [len(ids) for ids in found]
        padded = [ids + [0] * (derive.LENGTH - len(ids)) for ids in found]
        return Texts(torch.tensor(padded), torch.tensor(lengths))

    def _read(self, folder: Path, split: str) -> Split:
        table = pq.read_table(folder / f"{split}.parquet")
        targets = torch.tensor(table["label"].to_pylist(), dtype=torch.float32)
        return Split(self._tokenize(table["text"].to_pylist()), targets)

    def _read_pairs(self, path: Path) -> Pairs:
        table = pq.read_table(path).to_pydict()
        first, second = (self._tokenize(table[name]) for name in ("sentence1", "sentence2"))
        return Pairs(first, second, [float(score) for score in table[_score_column(table)]])


def small_model() -> nn.Module:
    """Return the first blocks of MiniLM-L6 without its pooler."""
    model: Any = AutoModel.from_pretrained(derive.minilm(), add_pooling_layer=False)
    model.encoder.layer = model.encoder.layer[: derive.BLOCKS]
    model.config.num_hidden_layers = derive.BLOCKS
    small: nn.Module = model
    return small


def _score_column(table: Mapping[str, Any]) -> str:
    return "label" if "label" in table else "score"


def embed(model: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch size"]:
    """Return the mean hidden state per text."""
    return mean_of_tokens(model(**inputs).last_hidden_state, inputs["attention_mask"])


def loss_of(model: nn.Module, split: Split, rows: list[int]) -> Float[Tensor, ""]:
    """Return the mean squared error per number of the targets."""
    return mse_loss(embed(model, split.texts.batch(rows)), split.targets[rows])


@torch.no_grad()
def embed_all(model: nn.Module, texts: Texts) -> Float[Tensor, "texts size"]:
    """Return the embeddings of all texts, computed in batches of similar length."""
    model.eval()
    order = texts.lengths.argsort(stable=True)
    found = [embed(model, texts.batch(rows.tolist())) for rows in order.split(EVALUATION_BATCH)]
    return torch.cat(found)[order.argsort()]


def evaluate(model: nn.Module, split: Split) -> float:
    """Return the mean squared error of a split."""
    return float(mse_loss(embed_all(model, split.texts), split.targets))


def score_pairs(model: nn.Module, pairs: Pairs) -> float:
    """Return Spearman's correlation between cosine similarity and the scores of people."""
    first, second = (embed_all(model, texts) for texts in (pairs.first, pairs.second))
    return float(spearmanr(cosine_similarity(first, second).numpy(), pairs.scores).statistic)
