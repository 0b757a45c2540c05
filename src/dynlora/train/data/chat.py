"""Validate conversations, and render them with the model's chat template."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from jinja2 import TemplateError

from dynlora.adapter_files.tables import column_values
from dynlora.errors import ConfigError
from dynlora.train.data.columns import refuse_rows
from dynlora.train.data.examples import Example
from dynlora.train.data.splits import RawSplit
from dynlora.train.data.turns import Conversation, UnmaskableError, choose_masking, render

Encoded = TypeVar("Encoded")


def check_template(tokenizer: Any, key: str) -> None:
    """Check that the tokenizer has a chat template, which configuration key `key` needs.

    Raises:
        ConfigError: If it has none.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"`{key}` needs a model with a chat template, but the tokenizer of "
            f"{tokenizer.name_or_path} has none: add `chat_template` to its tokenizer_config.json, "
            "or use `data.prompt` and `data.completion`, or `data.text`."
        )


def read_conversations(split: RawSplit, column: str) -> list[Conversation]:
    """Return a column of conversations.

    Raises:
        DataError: If a row has no messages, or a message lacks a text `role` or `content`.
    """
    rows: list[Conversation] = column_values(split.table, column, split.source)
    refuse_rows(
        split,
        f"column {column!r} must hold a list of messages in every row, each with the texts `role` "
        "and `content`",
        [(row, value) for row, value in enumerate(rows) if not _is_conversation(value)],
        'Write them as [{"role": "user", "content": "..."}, ...].',
    )
    return [[_without_missing(message) for message in row] for row in rows]


def _without_missing(value: Any) -> Any:
    """Return nested records without null keys: a table gives each record the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_missing(each) for key, each in value.items() if each is not None}
    return [_without_missing(each) for each in value] if isinstance(value, list) else value


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(value.get(key), str) for key in ("role", "content"))


def as_conversations(prompts: Sequence[str], completions: Sequence[str]) -> list[Conversation]:
    """Return one conversation per prompt: a user turn and an assistant turn."""
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def encode_conversations(
    split: RawSplit, conversations: Sequence[Conversation], tokenizer: Any, *, completion_only: bool
) -> list[Example]:
    """Tokenize conversations.

    Args:
        split: Source of the conversations, for error messages.
        conversations: One per row of `split`.
        tokenizer: Tokenizer with a chat template.
        completion_only: Whether only assistant turns are learned.

    Raises:
        ConfigError: If the template does not reveal the assistant turns.
        DataError: If a conversation has no assistant turn to learn, or the template rejects it.
    """
    if not completion_only:
        return _each(split, conversations, partial(_encode_whole, tokenizer))
    _require_answers(split, conversations)
    try:
        return _each(split, conversations, choose_masking(tokenizer))
    except UnmaskableError as error:
        raise ConfigError(
            "`data.completion_only` needs a chat template that shows where the assistant's turns "
            f"are, but that of {tokenizer.name_or_path} {error}: put its assistant's turns between "
            "`{% generation %}` and `{% endgeneration %}`, or set `data.completion_only: false`."
        ) from error


def encode_requests(
    split: RawSplit, conversations: Sequence[Conversation], tokenizer: Any
) -> list[list[int]]:
    """Tokenize conversations as requests for an answer, without a final assistant turn.

    Raises:
        DataError: If no message remains of a conversation, or the template rejects it.
    """
    asked = [row[:-1] if row[-1]["role"] == "assistant" else row for row in conversations]
    refuse_rows(
        split,
        "conversations must hold a message to answer",
        [(row, conversations[row]) for row, left in enumerate(asked) if not left],
        "Remove these rows.",
    )
    return _each(split, asked, partial(render, tokenizer, add_generation_prompt=True))


def _encode_whole(tokenizer: Any, conversation: Conversation) -> Example:
    ids = render(tokenizer, conversation)
    return Example(ids=ids, learned=[True] * len(ids))


def _require_answers(split: RawSplit, conversations: Sequence[Conversation]) -> None:
    refuse_rows(
        split,
        "conversations must hold a turn of the `assistant` to learn",
        [
            (row, [message["role"] for message in conversation])
            for row, conversation in enumerate(conversations)
            if not any(message["role"] == "assistant" for message in conversation)
        ],
        "Remove these rows, rename their roles, or set `data.completion_only: false`.",
    )


def _each(
    split: RawSplit,
    conversations: Sequence[Conversation],
    encode: Callable[[Conversation], Encoded],
) -> list[Encoded]:
    """Encode each conversation.

    Raises:
        DataError: If the chat template rejects one.
    """
    encoded, refused = [], []
    for row, conversation in enumerate(conversations):
        try:
            encoded.append(encode(conversation))
        except TemplateError as error:
            refused.append((row, str(error)))
    refuse_rows(
        split,
        "conversations must fit the model's chat template",
        refused,
        "These are its own words: change the roles or their order, or remove the rows.",
    )
    return encoded
