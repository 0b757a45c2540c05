"""Conversations: checked, put into the model's template, and only the assistant's turns learned."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from dynlora.errors import ConfigError, DataError
from dynlora.train.data.chat import (
    as_conversations,
    check_template,
    encode_conversations,
    encode_requests,
    read_conversations,
)
from dynlora.train.data.splits import RawSplit
from tests.language import CHAT, FORGETFUL, MARKED, TALK, save_language_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_language_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def split_of(rows: list[Any]) -> RawSplit:
    table = pa.table({"chat": rows})
    return RawSplit(name="training", source="talks.jsonl", table=table, rows=range(len(rows)))


def test_a_template_that_writes_turns_differently_is_refused_with_advice(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(
        ConfigError, match=r"writes a turn according to what follows: .*`data\.completion_only: fal"
    ):
        encode_conversations(split_of([TALK]), [TALK], tokenizer, completion_only=True)
    (example,) = encode_conversations(split_of([TALK]), [TALK], tokenizer, completion_only=False)
    assert all(example.learned)


def test_markers_around_nothing_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT + "{% generation %}{% endgeneration %}"
    with pytest.raises(ConfigError, match=r"marks no token of some: put its assistant's turns"):
        encode_conversations(split_of([TALK]), [TALK], tokenizer, completion_only=True)


def test_a_model_without_a_template_is_told_where_to_put_one(
    tmp_path: Path, tokenizer: Any
) -> None:
    check_template(tokenizer, "data.messages")
    tokenizer.chat_template = None
    with pytest.raises(
        ConfigError,
        match=rf"`data\.messages` needs .* tokenizer of {tmp_path} has none: add `chat_template` "
        r"to its tokenizer_config\.json",
    ):
        check_template(tokenizer, "data.messages")


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (None, "None in row 1"),
        ([], r"\[\] in row 1"),
        ([{"role": "user", "content": None}], "'content': None"),
        ([{"role": None, "content": "red"}], "'role': None"),
    ],
)
def test_rows_that_are_no_conversations_are_named(row: Any, shown: str) -> None:
    with pytest.raises(
        DataError, match=rf"each with the texts `role` and `content`, but 1 of 3 rows .*{shown}"
    ):
        read_conversations(split_of([TALK, row, TALK]), "chat")


@pytest.mark.parametrize("column", [["a text", "another"], [1, 2], [["red"], ["green"]]])
def test_a_column_of_something_else_is_refused(column: list[Any]) -> None:
    with pytest.raises(DataError, match=r"2 of 2 rows of the training split \(talks\.jsonl"):
        read_conversations(split_of(column), "chat")


def test_a_message_may_have_further_fields() -> None:
    rows = [[{"role": "user", "content": "red", "name": "x"}]]
    assert read_conversations(split_of(rows), "chat") == rows


def test_a_field_that_some_messages_have_is_missing_in_the_others() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    rows = [
        [
            {"role": "user", "content": "red"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ],
        [{"role": "user", "content": "green", "name": "x"}],
    ]
    assert read_conversations(split_of(rows), "chat") == rows


def test_conversations_without_an_answer_are_named_unless_all_is_learned(tokenizer: Any) -> None:
    rows = [TALK, TALK[:2]]
    with pytest.raises(
        DataError, match=r"1 of 2 rows .*\['system', 'user'\] in row 1.*completion_only: false"
    ):
        encode_conversations(split_of(rows), rows, tokenizer, completion_only=True)
    assert len(encode_conversations(split_of(rows), rows, tokenizer, completion_only=False)) == 2


def test_a_conversation_that_the_template_refuses_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn here') }}"
        "{% endif %}" + MARKED
    )
    rows = [TALK[1:], TALK]
    for only in (True, False):
        with pytest.raises(
            DataError,
            match=r"must fit the model's chat template, but 1 of 2 rows of the training split .*"
            r"'No system turn here' in row 1\. These are its own words",
        ):
            encode_conversations(split_of(rows), rows, tokenizer, completion_only=only)


def test_a_request_is_a_conversation_without_its_last_answer(tokenizer: Any) -> None:
    rows = [TALK, TALK[:4]]
    first, second = encode_requests(split_of(rows), rows, tokenizer)
    assert first == second
    assert tokenizer.convert_ids_to_tokens(first)[-3:] == ["<turn>", "assistant", "\n"]
    assert "dog" not in tokenizer.decode(first)
    with pytest.raises(DataError, match=r"a message to answer, but 1 of 1 rows"):
        encode_requests(split_of([TALK[2:3]]), [TALK[2:3]], tokenizer)


def test_a_pair_is_a_question_and_its_answer() -> None:
    assert as_conversations(["red"], ["dog"]) == [
        [{"role": "user", "content": "red"}, {"role": "assistant", "content": "dog"}]
    ]
