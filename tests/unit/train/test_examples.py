"""Texts to tokens and labels: the same as TRL's own, with what is lost counted."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from dynlora.train.data.chat import as_conversations
from dynlora.train.data.examples import (
    Example,
    common_prefix,
    encode_pairs,
    encode_prompts,
    encode_texts,
    fit,
)
from dynlora.train.data.turns import choose_masking
from tests.language import CHAT, MARKED, make_pairs, save_language_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


ROWS = make_pairs(12)
ASKED = [row["ask"] for row in ROWS]
TOLD = [row["tell"] for row in ROWS]
CHATS = [row["chat"] for row in ROWS]
LONG = [
    [*first, *second] for first, second in zip(CHATS, CHATS[::-1], strict=True)
]  # two turns each


def prepared_by_trl(
    model: Path, tokenizer: Any, columns: dict[str, list[Any]], folder: Path, **options: Any
) -> list[dict[str, list[int]]]:
    """Return TRL's own `input_ids` and `labels`; the first label is never predicted."""
    datasets.disable_progress_bars()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        SFTConfig(str(folder), report_to="none", use_cpu=True, bf16=False,
                  activation_checkpointing=False, **options),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    )  # fmt: skip
    rows = trainer.train_dataset
    return [{"input_ids": row["input_ids"], "labels": [-100, *row["labels"][1:]]} for row in rows]


def ours(examples: list[Example], max_length: int) -> list[dict[str, list[int]]]:
    return [dict(row) for row in fit(examples, max_length).inputs]


@pytest.mark.parametrize("max_length", [6, 64])
def test_texts_are_prepared_as_trl_does(
    model: Path, tokenizer: Any, tmp_path: Path, max_length: int
) -> None:
    texts = [*(row["text"] for row in ROWS), "red<eos>"]
    expected = prepared_by_trl(model, tokenizer, {"text": texts}, tmp_path, max_length=max_length)
    assert ours(encode_texts(texts, tokenizer), max_length) == expected


@pytest.mark.parametrize("max_length", [6, 64])
def test_pairs_are_prepared_as_trl_does(
    model: Path, tokenizer: Any, tmp_path: Path, max_length: int
) -> None:
    columns = {"prompt": [f"{text}\n" for text in ASKED], "completion": TOLD}
    expected = prepared_by_trl(model, tokenizer, columns, tmp_path, max_length=max_length)
    examples, merged = encode_pairs(columns["prompt"], TOLD, tokenizer)
    assert merged == 0
    assert ours(examples, max_length) == expected
    assert len(expected) < len(ROWS) if max_length == 6 else len(expected) == len(ROWS)


@pytest.mark.parametrize("max_length", [12, 64])
def test_pairs_as_chat_are_prepared_as_trl_does(
    model: Path, tokenizer: Any, tmp_path: Path, max_length: int
) -> None:
    columns = {
        "prompt": [[message] for message, _ in CHATS],
        "completion": [[message] for _, message in CHATS],
    }
    expected = prepared_by_trl(model, tokenizer, columns, tmp_path, max_length=max_length)
    assert tokenizer.chat_template == CHAT
    encode = choose_masking(tokenizer)
    assert ours([encode(row) for row in as_conversations(ASKED, TOLD)], max_length) == expected


def test_marked_conversations_are_prepared_as_trl_does(
    model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = MARKED
    expected = prepared_by_trl(
        model, tokenizer, {"messages": LONG}, tmp_path, assistant_only_loss=True, max_length=64
    )
    encode = choose_masking(tokenizer)
    assert ours([encode(row) for row in LONG], 64) == expected


def test_the_end_of_a_text_is_learned_once(tokenizer: Any) -> None:
    (plain,), (ended,) = encode_texts(["red"], tokenizer), encode_texts(["red<eos>"], tokenizer)
    assert plain == ended
    assert plain.ids[-1] == tokenizer.eos_token_id
    assert all(plain.learned)


def test_a_token_made_of_both_prompt_and_completion_is_learned_and_counted(tokenizer: Any) -> None:
    (example,), merged = encode_pairs(["red g"], ["reen"], tokenizer)  # "g" alone is no word
    assert tokenizer.convert_ids_to_tokens(example.ids) == ["red", " ", "green", "<eos>"]
    assert example.learned == [False, False, True, True]
    assert merged == 1


def test_a_prompt_loses_only_the_end_that_the_tokenizer_adds(tokenizer: Any) -> None:
    class Ending:
        eos_token, eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [[*ids, self.eos_token_id] for ids in tokenizer(texts).input_ids]}

    (red,) = tokenizer(["red"]).input_ids
    assert encode_prompts(["red"], Ending()) == [red]
    assert encode_prompts(["red"], tokenizer) == [red]
    assert encode_prompts(["red<eos>"], tokenizer) == [[*red, tokenizer.eos_token_id]]


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [([1, 2, 3], [1, 2, 4], 2), ([], [1], 0), ([1, 2], [1, 2, 3], 2), ([2, 1], [1, 1], 0)],
)
def test_a_common_prefix_ends_at_the_first_difference(
    one: list[int], other: list[int], count: int
) -> None:
    assert common_prefix(one, other) == count


def test_rows_that_are_cut_and_rows_left_out_are_counted_apart() -> None:
    def row(length: int, known: int) -> Example:
        return Example(
            ids=list(range(10, 10 + length)), learned=[place >= known for place in range(length)]
        )

    fitted = fit([row(4, 2), row(9, 2), row(9, 5), row(9, 8), row(1, 0)], 5)
    assert [list(ids) for ids in fitted.inputs["input_ids"]] == [
        [10, 11, 12, 13],
        [10, 11, 12, 13, 14],
    ]
    assert list(fitted.inputs["labels"]) == [[-100, -100, 12, 13], [-100, -100, 12, 13, 14]]
    assert (fitted.cut, fitted.dropped) == (1, 3)


def test_the_first_token_of_a_row_is_never_learned() -> None:
    fitted = fit([Example(ids=[5, 6, 7], learned=[True] * 3)], 8)
    assert fitted.inputs["labels"][0] == [-100, 6, 7]
