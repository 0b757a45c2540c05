"""Rows to model inputs."""

import logging
from pathlib import Path

import pyarrow as pa
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.data import Rows, check_rows, load_task, tokenize
from dynlora.train.sources import RawSplit
from tests.jobs import WORDS, save_tokenizer, write_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def split(**columns: list[object]) -> RawSplit:
    table = pa.table(columns)
    return RawSplit(name="training", source="here", table=table, rows=range(table.num_rows))


CONFIG = DataConfig(name="d")


def text_of(words: int) -> str:
    return " ".join(WORDS[n % len(WORDS)] for n in range(words))


def test_whole_numbers_of_any_type_are_labels() -> None:
    for labels in ([0, 1], [0.0, 1.0], [False, True]):
        assert check_rows(split(text=["a", "b"], label=labels), CONFIG, None).labels == [0, 1]


@pytest.mark.parametrize(
    ("labels", "num_labels", "told"),
    [
        ([0, 2], 2, r"\[0, 1\], but 1 of 2 .*: 2 in row 1\."),
        ([-1, -1], None, r"\[0, 1\], but 2 of 2 .*: -1 in row 0, -1 in row 1\."),
        ([1, 9], None, r"\[0, 1\], but 1 of 2 .*: 9 in row 1\. Renumber the classes, or set"),
        ([0, None], 2, r"whole number in every row, but 1 of 2 .*: None in row 1\."),
        ([0.0, float("nan")], 2, r"whole number .*: nan in row 1\."),
        (["a", "b"], None, r"whole number .*: 'a' in row 0, 'b' in row 1\."),
    ],
)
def test_other_labels_are_shown_with_their_rows(
    labels: list[object], num_labels: int | None, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        check_rows(split(text=["a", "b"], label=labels), CONFIG, num_labels)


def test_at_most_five_faults_are_shown_and_all_are_counted() -> None:
    faulty = split(text=[None] * 9 + ["a"], label=[0] * 10)
    with pytest.raises(DataError, match=r"9 of 10 rows .*None in row 4, \.\.\.") as error:
        check_rows(faulty, CONFIG, 2)
    assert "in row 5" not in str(error.value)


def test_a_column_that_stands_twice_is_refused() -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    doubled = RawSplit(
        name="training", source="here", table=table.append_column("label", [[0]]), rows=range(1)
    )
    with pytest.raises(DataError, match=r"'text', which the training split .* more than once"):
        check_rows(doubled, CONFIG, None)


@pytest.mark.parametrize("words", range(3, 13))
def test_a_text_is_cut_exactly_where_it_is_longer_than_the_limit(
    tokenizer: PreTrainedTokenizerBase, words: int
) -> None:
    rows = Rows(texts=["red", text_of(words)], pairs=None, labels=[0, 1])
    inputs, cut = tokenize(rows, tokenizer, 8)
    assert cut == (words + 2 > 8)
    assert [len(ids) for ids in inputs["input_ids"]] == [3, min(words + 2, 8)]
    expected = tokenizer(rows.texts, truncation=True, max_length=8)
    assert inputs["input_ids"] == expected["input_ids"]
    assert inputs["attention_mask"] == expected["attention_mask"]
    assert inputs["labels"] == [0, 1]


@pytest.mark.parametrize(("first", "second"), [(3, 2), (3, 3), (9, 1), (1, 9), (9, 9)])
def test_pairs_are_cut_as_the_tokenizer_cuts_them(
    tokenizer: PreTrainedTokenizerBase, first: int, second: int
) -> None:
    rows = Rows(texts=[text_of(first)], pairs=[text_of(second)], labels=[1])
    inputs, cut = tokenize(rows, tokenizer, 8)
    assert cut == (first + second + 3 > 8)
    expected = tokenizer(rows.texts, rows.pairs, truncation=True, max_length=8)
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        assert inputs[key] == expected[key]


def write(folder: Path, train: list[int], validation: list[int]) -> DataConfig:
    for name, labels in (("train", train), ("validation", validation)):
        write_rows(folder / f"{name}.jsonl", [{"text": "red", "label": n} for n in labels])
    return DataConfig(path=str(folder), max_length=8)


def test_the_number_of_classes_follows_from_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert load_task(write(tmp_path, [0, 1, 2], [1]), tokenizer).num_labels == 3
    assert load_task(write(tmp_path, [0, 0, 0], [1]), tokenizer).num_labels == 2
    with pytest.raises(DataError, match=r"\[0, 1\], but 1 of 1 rows of the validation split"):
        load_task(write(tmp_path, [0, 1], [2]), tokenizer)


def test_nothing_is_said_where_nothing_was_cut(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dynlora"):
        task = load_task(write(tmp_path, [0, 1], [1]), tokenizer)
    assert task.cut == {"train": 0, "validation": 0}
    assert not caplog.records
