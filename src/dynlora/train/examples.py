"""Texts to the tokens of a causal language model, and which of them it is to learn.

The rules are those of TRL's `SFTTrainer`, which would apply them row by row, hide how many rows it
cuts or drops, and only once the model is there; a test compares the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import datasets

from dynlora.train.columns import UNLABELLED


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row."""

    ids: list[int]
    """Its tokens."""
    learned: list[bool]
    """For each token, whether the loss counts it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Rows within the longest length."""

    inputs: Any
    """`datasets.Dataset` of `input_ids` and `labels`."""
    cut: int
    """Rows that lost their end."""
    dropped: int
    """Rows left out because nothing to learn was left of them."""


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[Example]:
    """Return texts with an end-of-text token, all of them to be learned."""
    return [
        Example(ids=ids, learned=[True] * len(ids))
        for ids in tokenizer([_ended(text, tokenizer) for text in texts])["input_ids"]
    ]


def encode_pairs(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any
) -> tuple[list[Example], int]:
    """Return prompts with their ended completions, of which only the latter are to be learned.

    A completion begins where its tokens and those of the prompt alone part: where the two meet,
    letters of both may make one token.

    Returns:
        The examples, and in how many the prompt's end has become part of the completion.
    """
    whole = [_ended(prompt + answer, tokenizer) for prompt, answer in _zip(prompts, completions)]
    examples, merged = [], 0
    for start, ids in _zip(encode_prompts(prompts, tokenizer), tokenizer(whole)["input_ids"]):
        known = common_prefix(start, ids)
        merged += known < len(start)
        learned = [place >= known for place in range(len(ids))]
        examples.append(Example(ids=ids, learned=learned))
    return examples, merged


def encode_prompts(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of texts to go on from, without the end that some tokenizers add."""
    end = tokenizer.eos_token_id
    encoded: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    return [
        ids[:-1] if ids[-1:] == [end] and not prompt.endswith(tokenizer.eos_token) else ids
        for prompt, ids in _zip(prompts, encoded)
    ]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def fit(examples: Sequence[Example], max_length: int) -> Fitted:
    """Cut examples at the end to `max_length` tokens, and drop those with nothing left to learn.

    Nothing comes before a row's first token, so that one is never learned.
    """
    rows, cut = [], 0
    for example in examples:
        ids = example.ids[:max_length]
        learned = [False, *example.learned[1:max_length]]
        if not any(learned):
            continue
        cut += len(example.ids) > max_length
        labels = [token if wanted else UNLABELLED for token, wanted in _zip(ids, learned)]
        rows.append({"input_ids": ids, "labels": labels})
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    inputs = datasets.Dataset.from_dict(columns)
    return Fitted(inputs=inputs, cut=cut, dropped=len(examples) - len(rows))


def _ended(text: str, tokenizer: Any) -> str:
    end: str = tokenizer.eos_token
    return text if text.endswith(end) else text + end


def _zip(one: Any, other: Any) -> Any:
    return zip(one, other, strict=True)
