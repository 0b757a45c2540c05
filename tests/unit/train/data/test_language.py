"""Rows of text, prompts with completions, and conversations: checked, and prepared as TRL does."""

import logging

import datasets
import pytest
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from dynlora.errors import ConfigError, DataError
from dynlora.train.data.conversations import (
    as_conversations,
    encode_conversations,
    encode_requests,
    read_conversations,
    warn_of_unlearned_stop,
)
from dynlora.train.data.language import (
    encode_pairs,
    encode_prompts,
    encode_texts,
    fit,
    pack,
    warn_of_merged,
)
from tests.jobs import split_of
from tests.language import CHAT, FORGETFUL, MARKED, TALK, make_pairs

ROWS = make_pairs(8)
TEXTS = [*(row["text"] for row in ROWS), "red<eos>"]
PROMPTS = [f"{row['ask']}\n" for row in ROWS]
ANSWERS = [row["tell"] for row in ROWS]
CHATS = [row["chat"] for row in ROWS]
LONG = [[*first, *second] for first, second in zip(CHATS, CHATS[::-1], strict=True)]


@pytest.fixture
def tokenizer(llama):
    """Return a tokenizer that a test may change."""
    return AutoTokenizer.from_pretrained(llama)


def encode(conversations, tokenizer, *, only=True):
    split = split_of(chat=[0] * len(conversations))
    return encode_conversations(split, conversations, tokenizer, completion_only=only)


def learned(tokenizer, encoded):
    """Return the learned tokens of the first row."""
    return tokenizer.convert_ids_to_tokens([t for t in encoded["labels"][0] if t != -100])


FORMS = {
    "text": (CHAT, {"text": TEXTS}, lambda t: encode_texts(TEXTS, t)),
    "pairs": (
        CHAT,
        {"prompt": PROMPTS, "completion": ANSWERS},
        lambda t: encode_pairs(PROMPTS, ANSWERS, t),
    ),
    # TRL finds the answer's tokens by the prompt's, and cannot for more than one answer.
    "unmarked": (
        CHAT,
        {"prompt": [row[:1] for row in CHATS], "completion": [row[1:] for row in CHATS]},
        lambda t: encode(CHATS, t),
    ),
    "marked": (MARKED, {"messages": LONG}, lambda t: encode(LONG, t)),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_prepared_as_in_a_trainer_of_trl(llama, tokenizer, tmp_path, form):
    datasets.disable_progress_bars()
    tokenizer.chat_template, columns, prepare = FORMS[form]
    options = SFTConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, activation_checkpointing=False,
        assistant_only_loss=form == "marked", max_length=12,
    )  # fmt: skip
    model, rows = AutoModelForCausalLM.from_pretrained(llama), datasets.Dataset.from_dict(columns)
    trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=tokenizer)
    found, _ = fit(prepare(tokenizer), 12)
    assert len(found) == len(trainer.train_dataset) > 0
    for mine, theirs in zip(found, trainer.train_dataset, strict=True):
        assert mine["input_ids"] == theirs["input_ids"]
        assert mine["labels"] == [-100, *theirs["labels"][1:]]  # no token precedes the first


def test_preparation_shows_no_progress_bars(tokenizer, capfd):
    datasets.enable_progress_bars()
    encode_texts(["red", "blue"], tokenizer)
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


def test_many_rows_are_packed_as_trl_packs_them_all_at_once(monkeypatch):
    ids = [[1] * (1 + row % 7) for row in range(2_500)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    monkeypatch.setattr("dynlora.train.data.language.ROWS", 1_000)  # as many as TRL packs together
    assert pack(rows, 16).to_dict() == trl.pack_dataset(rows, 16).to_dict()


def test_a_token_made_of_both_prompt_and_completion_is_learned_and_counted(tokenizer, caplog):
    rows = ["red g"], ["reen"], tokenizer  # "g" is no word
    assert learned(tokenizer, encode_pairs(*rows)) == ["green", "<eos>"]
    with caplog.at_level(logging.WARNING):
        warn_of_merged(*rows, "training")
    assert [r.message.partition(" rows")[0] for r in caplog.records] == [
        "in 1 of the first 1 training"
    ]


def test_a_prompt_loses_only_the_end_that_the_tokenizer_adds(tokenizer):
    class Ending:
        eos_token, eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id

        def __call__(self, texts):
            return {"input_ids": [[*ids, self.eos_token_id] for ids in tokenizer(texts).input_ids]}

    (red,) = tokenizer(["red"]).input_ids
    assert encode_prompts(["red"], Ending()) == encode_prompts(["red"], tokenizer) == [red]
    assert encode_prompts(["red<eos>"], tokenizer) == [[*red, tokenizer.eos_token_id]]


def test_rows_that_are_cut_are_counted_without_those_left_out():
    def row(length, known):
        ids = list(range(10, 10 + length))
        return {"input_ids": ids, "labels": [-100] * known + ids[known:]}

    rows = [row(4, 2), row(9, 2), row(9, 5), row(9, 8), row(1, 0)]
    inputs, cut = fit(datasets.Dataset.from_list(rows), 5)
    assert [len(ids) for ids in inputs["input_ids"]] == [4, 5]
    assert inputs["labels"][1] == [-100, -100, 12, 13, 14]
    assert cut == 1


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHAT, ["<end>", "\n"]), (MARKED, ["<end>"]), (qwen2_5_chat_template, ["<|im_end|>"])],
)
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tokenizer, template, end):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]})
    tokenizer.chat_template = template
    found = learned(tokenizer, encode([TALK], tokenizer))
    if template == qwen2_5_chat_template:  # TRL's variant may mark a line break
        found = [word for word in found if word != "\n"]
    assert found == ["green", " ", "blue", *end, "dog", *end]


def test_a_token_across_the_beginning_of_a_turn_is_learned(tokenizer):
    tokenizer.add_tokens(["\n\n"])
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "\ncat"}]
    assert learned(tokenizer, encode([talk], tokenizer)) == ["\n\n", "cat", "<end>", "\n"]


def test_markers_that_leave_out_the_end_of_a_turn_are_told(tokenizer, caplog):
    tokenizer.chat_template = MARKED.replace(
        "{% generation %}{{ message['content'] + '<end>' }}{% endgeneration %}",
        "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<end>' }}",
    )
    assert "<end>" not in learned(tokenizer, encode([TALK], tokenizer))
    with caplog.at_level(logging.WARNING, logger="dynlora"):
        warn_of_unlearned_stop(tokenizer)
    assert "the model may not learn to stop" in caplog.text


@pytest.mark.parametrize(
    ("template", "talk", "told"),
    [
        (FORGETFUL, TALK, "writes a turn according to what follows: .*completion_only: false"),
        (CHAT + "{% generation %}{% endgeneration %}", TALK, "marks no token of some: put its"),
        (CHAT, TALK[2:], "no markers for a conversation that begins with one"),
    ],
)
def test_a_template_that_hides_the_turns_is_refused_unless_all_is_learned(
    tokenizer, template, talk, told
):
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=told):
        encode([talk], tokenizer)
    encoded = encode([talk], tokenizer, only=False)
    assert encoded["labels"][0] == encoded["input_ids"][0]


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ([TALK, None, [], TALK], r"2 of 4 rows .*None in row 1, \[\] in row 2"),
        ([[{"role": "user", "content": None}]], "1 of 1 rows .*'content': None"),
        ([[{"role": None, "content": "red"}]], "1 of 1 rows .*'role': None"),
        (["a text"], r"1 of 1 rows of the training split \(here"),
        ([["red"]], "1 of 1 rows"),
    ],
)
def test_rows_that_are_no_conversations_are_named(rows, shown):
    with pytest.raises(DataError, match=rf"each with the texts `role` and `content`, but {shown}"):
        read_conversations(split_of(chat=rows), "chat")


def test_fields_of_some_messages_stay_theirs_alone(tokenizer):
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    asked = {"role": "user", "content": "red"}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    rows = [[asked, called], [asked | {"name": "x"}, {"role": "assistant", "content": "blue"}]]
    assert read_conversations(split_of(chat=rows), "chat") == rows
    # The template sees only the keys that a message has.
    tokenizer.chat_template = MARKED.replace("{{ '\n' }}", "{{ '.' * (message | length) }}")
    dot = tokenizer.convert_tokens_to_ids(".")
    assert [ids.count(dot) for ids in encode(rows, tokenizer)["input_ids"]] == [5, 5]


def test_conversations_without_an_answer_are_named_unless_all_is_learned(tokenizer):
    rows = [TALK, TALK[:2]]
    told = r"1 of 2 rows .*\['system', 'user'\] in row 1.*completion_only: false"
    with pytest.raises(DataError, match=told):
        encode(rows, tokenizer)
    assert len(encode(rows, tokenizer, only=False)) == 2


def test_a_conversation_that_the_template_refuses_is_named(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn here') }}"
        "{% endif %}" + MARKED
    )
    told = r"the model's chat template, but 1 of 2 .*'No system turn here' in row 1\. These are its"
    with pytest.raises(DataError, match=told):
        encode([TALK[1:], TALK], tokenizer)


def test_a_request_is_a_conversation_without_its_last_answer(tokenizer):
    rows = [TALK, TALK[:4], *as_conversations(["cat"], ["dog"])]
    first, second, third = encode_requests(split_of(chat=rows), rows, tokenizer)
    assert first == second
    assert first[-len(third) :] == third
    written = "".join(tokenizer.convert_ids_to_tokens(third))
    assert written == "<turn>user\ncat<end>\n<turn>assistant\n"
    with pytest.raises(DataError, match=r"a message to answer, but 1 of 1 rows"):
        encode_requests(split_of(chat=[TALK[2:3]]), [TALK[2:3]], tokenizer)
