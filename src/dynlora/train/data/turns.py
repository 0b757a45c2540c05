"""Find the tokens of the assistant's turns in a conversation.

Uses the `{% generation %}` markers of the template, or of TRL's variant of it. For other templates
it compares the tokens of growing parts of the conversation: an assistant turn follows the tokens of
all earlier messages plus the generation prompt.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from dynlora.train.data.examples import Example, common_prefix

Conversation = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`."""

logger = logging.getLogger(__name__)


class UnmaskableError(Exception):
    """Raised if a template does not reveal the assistant's turns."""


def choose_masking(tokenizer: Any) -> Callable[[Conversation], Example]:
    """Return the encoder that suits the tokenizer's chat template."""
    template = tokenizer.chat_template
    if not has_generation_markers(template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            return partial(encode_by_turns, tokenizer)
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        logger.warning(
            "the chat template of %s leaves the end of the assistant's turns outside its "
            "{%% generation %%} markers: the model may not learn to stop.",
            tokenizer.name_or_path,
        )
    return partial(encode_by_markers, tokenizer, template)


def encode_by_markers(tokenizer: Any, template: str, conversation: Conversation) -> Example:
    """Encode a conversation with a template that marks the assistant's turns.

    Raises:
        UnmaskableError: If the template marks no token.
    """
    encoded = tokenizer.apply_chat_template(
        list(conversation),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        chat_template=template,
    )
    learned = [bool(flag) for flag in encoded["assistant_masks"]]
    if not any(learned):
        raise UnmaskableError("marks no token of some")
    return Example(ids=encoded["input_ids"], learned=learned)


def encode_by_turns(tokenizer: Any, conversation: Conversation) -> Example:
    """Encode a conversation with a template that renders turns independently of later turns.

    Raises:
        UnmaskableError: If later turns matter, or the conversation begins with the assistant.
    """
    ids, text = render(tokenizer, conversation), _write(tokenizer, conversation)

    def reach(part: Conversation, **options: Any) -> int:
        """Return the number of leading tokens that belong to the first turns."""
        if not text.startswith(_write(tokenizer, part, **options)):
            raise UnmaskableError("has no markers and writes a turn according to what follows")
        return common_prefix(render(tokenizer, part, **options), ids)

    learned = [False] * len(ids)
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise UnmaskableError("has no markers for a conversation that begins with one")
        start = reach(conversation[:turn], add_generation_prompt=True)
        end = reach(conversation[: turn + 1])
        learned[start:end] = [True] * (end - start)
    return Example(ids=ids, learned=learned)


def render(tokenizer: Any, conversation: Conversation, **options: Any) -> list[int]:
    """Return the tokens of a conversation in the chat template.

    Args:
        tokenizer: Tokenizer with a chat template.
        conversation: At least one message.
        options: Options of `apply_chat_template`, such as `add_generation_prompt`.
    """
    ids: list[int] = tokenizer.apply_chat_template(
        list(conversation), tokenize=True, return_dict=True, **options
    )["input_ids"]
    return ids


def _write(tokenizer: Any, conversation: Conversation, **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(list(conversation), tokenize=False, **options)
    return text
