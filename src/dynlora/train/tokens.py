"""Texts or words to model inputs: tokens, cut at a length, and how many had to be cut."""

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


def tokenize_words(
    words: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, list[Any]], list[list[int | None]], int]:
    """Return the tokenizer's columns, where each word begins, and how many rows were cut.

    A row is read as the text that its words make with spaces between them: many vocabularies know a
    word by the space before it.

    Args:
        words: Those of each row.
        tokenizer: The model's; a fast one, which knows what characters a token stands for.
        max_length: Most tokens of a row, special tokens included.

    Returns:
        The columns; for each row and word the place of its first token, None where the word was
        cut off or has no token of its own; and how many rows were cut.
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
