"""Tokenize texts for a causal language model, and mark the tokens in the loss.

Follows the rules of TRL's `SFTTrainer`, and also counts truncated and dropped rows before the
model is loaded. A test compares the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import datasets

from dynlora.train.data.columns import UNLABELLED


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row."""

    ids: list[int]
    """Token ids."""
    learned: list[bool]
    """Per token, whether it is in the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Rows truncated to the maximum length."""

    inputs: Any
    """`datasets.Dataset` of `input_ids` and `labels`."""
    cut: int
    """Truncated rows."""
    dropped: int
    """Rows dropped because no learned token remained."""


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[Example]:
    """Tokenize texts with an end-of-text token; all tokens are learned."""
    return [
        Example(ids=ids, learned=[True] * len(ids))
        for ids in tokenizer([_ended(text, tokenizer) for text in texts])["input_ids"]
    ]


def encode_pairs(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any
) -> tuple[list[Example], int]:
    """Tokenize prompts with completions and an end-of-text token; only completions are learned.

    The completion begins at the first token that differs from the tokens of the prompt alone,
    because one token can span the end of the prompt and the start of the completion.

    Returns:
        The examples, and the number of examples with such a token.
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
    """Tokenize prompts without the end-of-text token that some tokenizers append."""
    end = tokenizer.eos_token_id
    encoded: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    return [
        ids[:-1] if ids[-1:] == [end] and not prompt.endswith(tokenizer.eos_token) else ids
        for prompt, ids in _zip(prompts, encoded)
    ]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def fit(examples: Sequence[Example], max_length: int) -> Fitted:
    """Truncate examples to `max_length` tokens, and drop examples without a learned token.

    The first token of a row is never learned, because no token precedes it.
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
