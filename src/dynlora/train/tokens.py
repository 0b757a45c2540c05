"""Texts to model inputs: tokens, cut at a length, and how many had to be cut."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenize(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[dict[str, list[Any]], int]:
    """Return the tokenizer's columns, cut at `max_length` tokens, and how many texts were cut.

    Inputs are first cut one token too late: what is then too long is what had to be cut.

    Args:
        texts: One a row.
        pairs: Second texts; None where there is one text.
        tokenizer: The model's.
        max_length: Most tokens of a row, special tokens included.
    """

    def encode(first: Sequence[str], second: Sequence[str] | None, limit: int) -> dict[str, Any]:
        given = None if second is None else list(second)
        return dict(tokenizer(list(first), given, truncation=True, max_length=limit))

    columns = encode(texts, pairs, max_length + 1)
    long = [row for row, ids in enumerate(columns["input_ids"]) if len(ids) > max_length]
    if long:
        second = None if pairs is None else [pairs[row] for row in long]
        again = encode([texts[row] for row in long], second, max_length)
        for name, values in again.items():
            for row, value in zip(long, values, strict=True):
                columns[name][row] = value
    return columns, len(long)
