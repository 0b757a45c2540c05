"""Which tokens of a conversation are the assistant's, in every kind of template."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dynlora.train.data.turns import choose_masking
from tests.language import CHAT, MARKED, TALK, save_language_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_language_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def learned_words(tokenizer: Any, conversation: list[dict[str, str]]) -> list[str]:
    example = choose_masking(tokenizer)(conversation)
    return [
        tokenizer.convert_ids_to_tokens(token)
        for token, wanted in zip(example.ids, example.learned, strict=True)
        if wanted
    ]


@pytest.mark.parametrize(("template", "after"), [(CHAT, ["\n"]), (MARKED, [])])
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(
    tokenizer: Any, template: str, after: list[str]
) -> None:
    tokenizer.chat_template = template
    first, second = ["green", " ", "blue", "<end>", *after], ["dog", "<end>", *after]
    assert learned_words(tokenizer, TALK) == first + second


def test_a_token_across_the_beginning_of_a_turn_is_learned(tokenizer: Any) -> None:
    tokenizer.add_tokens(["\n\n"])
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "\ncat"}]
    assert learned_words(tokenizer, talk) == ["\n\n", "cat", "<end>", "\n"]


def test_a_template_that_trl_knows_is_marked_by_trl(tokenizer: Any) -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer.chat_template = qwen2_5_chat_template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]})
    words = learned_words(tokenizer, TALK)
    assert [word for word in words if word != "\n"] == [
        "green", " ", "blue", "<|im_end|>", "dog", "<|im_end|>",
    ]  # fmt: skip


def test_markers_that_leave_out_the_end_of_a_turn_are_told(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = MARKED.replace(
        "{% generation %}{{ message['content'] + '<end>' }}{% endgeneration %}",
        "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<end>' }}",
    )
    with caplog.at_level(logging.WARNING, logger="dynlora"):
        assert learned_words(tokenizer, TALK) == ["green", " ", "blue", "dog"]
    assert "the model may not learn to stop" in caplog.text
