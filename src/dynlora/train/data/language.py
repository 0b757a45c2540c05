"""Encode texts, and prompts with completions, for a causal language model, as TRL does.

Truncated and dropped rows are counted here, before the model is loaded. Data of more than `ROWS`
rows is encoded in parts, which are kept on disk.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import datasets
from trl import SFTConfig, SFTTrainer, pack_dataset

from dynlora.files.tables import ROWS, on_disk
from dynlora.train.data.columns import UNLABELLED

logger = logging.getLogger(__name__)


def encode_texts(texts: Sequence[str], tokenizer: Any) -> Any:
    """Return a `datasets.Dataset` of `input_ids` and `labels`; all tokens are learned."""
    return prepare(datasets.Dataset.from_dict({"text": list(texts)}), tokenizer)


def encode_pairs(prompts: Sequence[str], completions: Sequence[str], tokenizer: Any) -> Any:
    """Return a `datasets.Dataset` of `input_ids` and `labels`; only completions are learned."""
    rows = datasets.Dataset.from_dict({"prompt": list(prompts), "completion": list(completions)})
    return prepare(rows, tokenizer, completion_only=True)


def warn_of_merged(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any, split: str
) -> None:
    """Warn of tokens that a prompt and its completion share."""
    encoded = encode_pairs(prompts, completions, tokenizer)["input_ids"]
    starts = encode_prompts(prompts, tokenizer)
    merged = sum(ids[: len(start)] != start for start, ids in zip(starts, encoded, strict=True))
    if merged:
        logger.warning(
            "in %d of the first %d %s rows the last letters of the prompt and the first of the "
            "completion make one token, which is learned: end `data.separator` with a line break.",
            merged, len(prompts), split,
        )  # fmt: skip


def encode_prompts(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize prompts without the end-of-text token that some tokenizers append."""
    end = tokenizer.eos_token_id
    encoded: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    return [
        ids[:-1] if ids[-1:] == [end] and not prompt.endswith(tokenizer.eos_token) else ids
        for prompt, ids in zip(prompts, encoded, strict=True)
    ]


def fit(encoded: Any, max_length: int) -> tuple[Any, int]:
    """Return truncated rows with a token in the loss, and the number of rows that were longer.

    The first token of a row is never in the loss, because no token precedes it.
    """
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    cut = 0
    for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True):
        kept = [UNLABELLED, *labels[1:max_length]]
        if set(kept) != {UNLABELLED}:
            cut += len(ids) > max_length
            columns["input_ids"].append(ids[:max_length])
            columns["labels"].append(kept)
    return datasets.Dataset.from_dict(columns), cut


def prepare(
    rows: Any, tokenizer: Any, *, completion_only: bool = False, template: str | None = None
) -> Any:
    """Return a `datasets.Dataset` of `input_ids` and `labels` from TRL's preparation.

    With `template`, only tokens between its markers are learned. TRL prepares rows only while it
    constructs a trainer, which needs a model. That step reads the attributes set here. It raises a
    RuntimeError if a row has no such tokens.
    """
    trainer, options = SFTTrainer.__new__(SFTTrainer), SFTConfig.__new__(SFTConfig)
    trainer._tokenizer, trainer.chat_template = tokenizer, template
    trainer.completion_only_loss = completion_only
    options.assistant_only_loss, options.max_length = template is not None, None
    with _quiet():
        prepared = trainer._prepare_dataset(rows, tokenizer, options, False, None, "")
    return prepared.select_columns(["input_ids", "labels"])


def pack(rows: Any, max_length: int) -> Any:
    """Return a `datasets.Dataset` whose rows contain several rows each, in `seq_lengths` tokens."""
    with _quiet():
        starts = range(0, len(rows), ROWS)
        parts = (rows.select(range(start, min(start + ROWS, len(rows)))) for start in starts)
        return joined(pack_dataset(part, max_length) for part in parts)


def joined(parts: Iterable[Any]) -> Any:
    """Return the rows of `datasets.Dataset`s as one, which is on disk if there are several."""
    rest = iter(parts)
    start = list(islice(rest, 2))
    if len(start) == 1:
        return start[0]
    tables = (part.with_format("arrow")[:] for part in chain(start, rest))
    return datasets.Dataset(on_disk(tables))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars, and TRL's warning on merged tokens, which `encode_pairs` counts."""
    trl = logging.getLogger("trl")
    level, bars = trl.level, not datasets.are_progress_bars_disabled()
    trl.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        trl.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
