"""Tokenize texts or words, truncate them, and count the truncated rows."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase


def tokenize(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[dict[str, list[Any]], int]:
    """Return the tokenizer's columns and the number of truncated rows.

    The first pass truncates at `max_length + 1` tokens, so longer rows can be counted.

    Args:
        texts: One text per row.
        pairs: Second text per row; None for single texts.
        tokenizer: The model's tokenizer.
        max_length: Maximum tokens per row, special tokens included.
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


def tokenize_words(
    words: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, list[Any]], list[list[int | None]], int]:
    """Return the tokenizer's columns, the first token per word, and the number of truncated rows.

    Words are joined with spaces, because many vocabularies include the space before a word.

    Args:
        words: Words per row.
        tokenizer: The model's fast tokenizer, which maps characters to tokens.
        max_length: Maximum tokens per row, special tokens included.

    Returns:
        The columns; per row and word the index of its first token, None if the word was truncated
        or has no token of its own; the number of truncated rows.
    """
    texts = [" ".join(row) for row in words]
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    starts = [
        _first_tokens(encoding, row)
        for encoding, row in zip(encoded.encodings or (), words, strict=True)
    ]
    cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
    return dict(encoded), starts, cut


def _first_tokens(encoding: Encoding, words: Sequence[str]) -> list[int | None]:
    places: list[int | None] = []
    begin = 0
    for word in words:
        tokens = map(encoding.char_to_token, range(begin, begin + len(word)))
        first = next((token for token in tokens if token is not None), None)
        places.append(None if first in places else first)
        begin += len(word) + 1
    return places
