"""Both splits of a job: loaded, checked by its task and made into model inputs."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.load import load_data
from dynlora.train.tasks.sequence import MULTI_LABEL, REGRESSION, SEQUENCE_CLASSIFICATION
from tests.jobs import save_tokenizer, write_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def write(folder: Path, train: list[Any], validation: list[Any], **config: Any) -> DataConfig:
    for name, labels in (("train", train), ("validation", validation)):
        write_rows(folder / f"{name}.jsonl", [{"text": "red", "label": n} for n in labels])
    return DataConfig(path=str(folder), max_length=8, **config)


def test_the_number_of_classes_follows_from_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def classes(train: list[int], validation: list[int]) -> int | None:
        config = write(tmp_path, train, validation)
        return load_data(SEQUENCE_CLASSIFICATION, config, tokenizer).num_labels

    assert classes([0, 1, 2], [1]) == 3
    assert classes([0, 0, 0], [1]) == 2
    with pytest.raises(DataError, match=r"\[0, 1\], but 1 of 1 rows of the validation split"):
        classes([0, 1], [2])


def test_a_number_of_classes_that_is_given_wins(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = write(tmp_path, [0, 1, 1], [4], num_labels=5)
    assert load_data(SEQUENCE_CLASSIFICATION, config, tokenizer).num_labels == 5


def test_labels_stand_beside_their_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load_data(SEQUENCE_CLASSIFICATION, write(tmp_path, [0, 1, 1], [1]), tokenizer)
    assert data.train["labels"] == [0, 1, 1]
    assert data.validation["labels"] == [1]
    assert data.train["input_ids"] == [tokenizer("red")["input_ids"]] * 3


def test_a_number_needs_one_output(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_data(REGRESSION, write(tmp_path, [0.5, -3], [7]), tokenizer)
    assert data.num_labels == 1
    assert data.train["labels"] == [0.5, -3.0]


def test_any_number_of_classes_becomes_a_zero_or_one_for_each(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = write(tmp_path, [[0, 2], [], [1]], [[2]])
    data = load_data(MULTI_LABEL, config, tokenizer)
    assert data.num_labels == 3
    assert data.train["labels"] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert data.validation["labels"] == [[0, 0, 1]]
    assert load_data(MULTI_LABEL, write(tmp_path, [[0]], [[]]), tokenizer).num_labels == 2
    config = write(tmp_path, [[0]], [[3]], num_labels=4)
    assert load_data(MULTI_LABEL, config, tokenizer).validation["labels"] == [[0, 0, 0, 1]]
    with pytest.raises(
        DataError, match=r"\[0, 2\], but 1 of 2 .* validation .*: \[0, 3\] in row 1"
    ):
        load_data(MULTI_LABEL, write(tmp_path, [[0, 2], [], [1]], [[], [0, 3]]), tokenizer)


def test_rows_that_were_cut_are_counted_by_split_and_told_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    config = write(tmp_path, [0, 1, 1], [1])
    write_rows(tmp_path / "train.jsonl", [{"text": "red " * n, "label": 0} for n in (6, 7, 20)])
    with caplog.at_level(logging.INFO, logger="dynlora"):
        data = load_data(SEQUENCE_CLASSIFICATION, config, tokenizer)
    assert data.cut == {"train": 2, "validation": 0}
    (told,) = caplog.messages
    assert "2 of 3 training and 0 of 1 validation inputs are longer than data.max_length=8" in told


def test_nothing_is_said_where_nothing_was_cut(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dynlora"):
        data = load_data(SEQUENCE_CLASSIFICATION, write(tmp_path, [0, 1], [1]), tokenizer)
    assert data.cut == {"train": 0, "validation": 0}
    assert not caplog.records
