"""Check conversations, format them with the chat template, and find the assistant's turns."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import datasets
from jinja2 import TemplateError
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import common_prefix_length
from trl.trainer.utils import remove_none_values

from dynlora.errors import ConfigError
from dynlora.train.data.columns import UNLABELLED, read_column, refuse_rows
from dynlora.train.data.language import prepare
from dynlora.train.data.splits import RawSplit

Conversation = Sequence[Mapping[str, Any]]  # messages with `role` and `content`
Encoded = TypeVar("Encoded")

KEYS = {"from": "role", "value": "content"}
ROLES = {"human": "user", "gpt": "assistant"}
"""Keys and roles of ShareGPT's messages, as chat templates name them."""

logger = logging.getLogger(__name__)


def check_template(tokenizer: Any, key: str) -> None:
    """Check that the tokenizer has a chat template, which configuration key `key` needs."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"`{key}` needs a model with a chat template, but the tokenizer of "
            f"{tokenizer.name_or_path} has none: add `chat_template` to its tokenizer_config.json, "
            "or use `data.prompt` and `data.completion`, or `data.text`."
        )


def read_conversations(split: RawSplit, column: str) -> list[Conversation]:
    """Return a column of conversations."""
    rows: list[Any] = [
        list(map(_renamed, row)) if isinstance(row, list) else row
        for row in read_column(split, "data.messages", column)
    ]
    refuse_rows(
        split,
        f"column {column!r} must hold a list of messages in every row, each with the texts `role` "
        "and `content`",
        [
            (row, value)
            for row, value in enumerate(rows)
            if not isinstance(value, list) or not value or not all(map(_is_message, value))
        ],
        'Write them as [{"role": "user", "content": "..."}, ...].',
    )
    # A table gives each message the keys of all rows.
    return [remove_none_values(row) for row in rows]


def _renamed(value: Any) -> Any:
    """Return a message with the keys and roles of chat templates."""
    if not isinstance(value, dict) or not isinstance(value.get("from"), str):
        return value
    renamed = {KEYS.get(key, key): each for key, each in value.items()}
    return renamed | {"role": ROLES.get(value["from"], value["from"])}


def _is_message(value: object) -> bool:
    texts = ("role", "content")
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in texts)


def as_conversations(prompts: Sequence[str], completions: Sequence[str]) -> list[Conversation]:
    """Return one conversation per prompt: a user turn and an assistant turn."""
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def encode_conversations(
    split: RawSplit, conversations: Sequence[Conversation], tokenizer: Any, *, completion_only: bool
) -> Any:
    """Return a `datasets.Dataset` of `input_ids` and `labels`, one conversation per row of `split`.

    With `completion_only`, tokens between the template's `{% generation %}` markers are learned.
    Templates without markers, for which TRL has no variant, are compared turn by turn.
    """
    template = None
    if completion_only:
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
        template = _marked_template(tokenizer)
        if template is None:
            by_turns = _each(split, conversations, partial(_encode_by_turns, tokenizer))
            return datasets.Dataset.from_list(by_turns)
    write = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    _each(split, conversations, write)
    # As JSON, messages keep their own keys; a plain table would give each the keys of all.
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    rows = datasets.Dataset.from_dict({"messages": list(conversations)}, features=features)
    try:
        return prepare(rows, tokenizer, template=template)
    except RuntimeError as error:
        raise _unmaskable(tokenizer, "marks no token of some") from error


def _marked_template(tokenizer: Any) -> str | None:
    """Return the template, or TRL's variant of it, with markers; None if there is none."""
    template: str = tokenizer.chat_template
    if not has_generation_markers(template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            return None
    return template


def warn_of_unlearned_stop(tokenizer: Any) -> None:
    """Warn of a template whose markers leave out the end of a turn."""
    template = _marked_template(tokenizer)
    if template and not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        logger.warning(
            "the chat template of %s leaves the end of the assistant's turns outside its "
            "{%% generation %%} markers: the model may not learn to stop.",
            tokenizer.name_or_path,
        )


def _encode_by_turns(tokenizer: Any, conversation: Conversation) -> dict[str, list[int]]:
    """Encode a conversation with a template that renders turns independently of later turns."""
    write = partial(tokenizer.apply_chat_template, tokenize=False)
    ids, text = _render(tokenizer, conversation), write(conversation)

    def reach(part: Conversation, **options: Any) -> int:
        """Return the number of leading tokens that belong to the first turns."""
        if not text.startswith(write(part, **options)):
            reason = "has no markers and writes a turn according to what follows"
            raise _unmaskable(tokenizer, reason)
        return int(common_prefix_length(_render(tokenizer, part, **options), ids))

    labels = [UNLABELLED] * len(ids)
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise _unmaskable(tokenizer, "has no markers for a conversation that begins with one")
        start = reach(conversation[:turn], add_generation_prompt=True)
        end = reach(conversation[: turn + 1])
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def _unmaskable(tokenizer: Any, reason: str) -> ConfigError:
    """Return the error for a template that does not reveal the assistant's turns."""
    return ConfigError(
        "`data.completion_only` needs a chat template that shows where the assistant's turns "
        f"are, but that of {tokenizer.name_or_path} {reason}: put its assistant's turns between "
        "`{% generation %}` and `{% endgeneration %}`, or set `data.completion_only: false`."
    )


def ends_of_turn(tokenizer: Any) -> set[int]:
    """Return the special token after which the chat template ends an answer; empty if none."""
    answer = "dynlora"  # no template has this word
    (talk,) = as_conversations(["a"], [answer])
    with suppress(TemplateError):
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        rest = text.rpartition(answer)[2].lstrip()
        first = tokenizer(rest, add_special_tokens=False)["input_ids"][:1]
        return {*first} & {*tokenizer.added_tokens_decoder}
    return set()


def encode_requests(
    split: RawSplit, conversations: Sequence[Conversation], tokenizer: Any
) -> list[list[int]]:
    """Tokenize conversations as requests for an answer, without a final assistant turn."""
    asked = [row[:-1] if row[-1]["role"] == "assistant" else row for row in conversations]
    refuse_rows(
        split,
        "conversations must hold a message to answer",
        [(row, conversations[row]) for row, left in enumerate(asked) if not left],
        "Remove these rows.",
    )
    return _each(split, asked, partial(_render, tokenizer, add_generation_prompt=True))


def _render(tokenizer: Any, conversation: Conversation, **options: Any) -> list[int]:
    """Return the tokens of a conversation in the chat template."""
    ids: list[int] = tokenizer.apply_chat_template(conversation, **options)["input_ids"]
    return ids


def _each(
    split: RawSplit,
    conversations: Sequence[Conversation],
    encode: Callable[[Conversation], Encoded],
) -> list[Encoded]:
    """Encode each conversation, and refuse those that the chat template rejects."""
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
