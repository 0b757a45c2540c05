"""Texts that layers shall see: which rows are read, and what is said of those that cannot be."""

import pytest
import torch

from dynlora.adapter_files.base import BaseSource
from dynlora.adapter_files.texts import batch_texts, read_texts
from dynlora.errors import DataError
from tests.jobs import write_rows
from tests.language import save_language_tokenizer


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_rows_are_spread_evenly_over_the_file(ending, tmp_path):
    rows = [{"text": f"red {number}", "other": "cat"} for number in range(10)]
    path = write_rows(tmp_path / f"rows{ending}", rows)
    assert read_texts(path, {"--text": "text"}, 5) == [
        ["red 0", "red 2", "red 4", "red 6", "red 8"]
    ]
    first, second = read_texts(path, {"--text": "text", "--text-pair": "other"}, 99)
    assert first == [row["text"] for row in rows]
    assert second == ["cat"] * 10


def test_texts_of_digits_stay_texts(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [{"text": "007"}, {"text": "12"}])
    assert read_texts(path, {"--text": "text"}, 9) == [["007", "12"]]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.txt", "red", r"\.parquet, \.csv, \.jsonl.*rows\.txt"),
        ("rows.jsonl", '{"other": "red"}\n', r"column.*'text'.*its columns are other"),
        ("rows.jsonl", '{"text": "red"}\n{"text": null}\n', r"got None in row 1"),
        ("rows.jsonl", '{"text": 7}\n', r"got 7 in row 0"),
        ("rows.jsonl", '{"text": ', r"readable \.jsonl file"),
        ("rows.parquet", "PAR1", r"readable \.parquet file"),
        ("rows.csv", "text\n", r"at least 1 row, got 0"),
    ],
)
def test_a_file_that_is_not_texts_is_refused(name, content, told, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        read_texts(path, {"--text": "text"}, 4)
    with pytest.raises(DataError, match="must be a file"):
        read_texts(tmp_path / "absent.csv", {"--text": "text"}, 4)


def test_batches_are_padded_and_no_longer_than_the_model_can_read(model):
    texts = [["red " * length for length in range(1, 21)]]
    batches = batch_texts(texts, BaseSource(str(model)), 10)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 4]
    assert batches[1]["input_ids"].shape == (4, 10)
    expected = torch.tensor([min(length + 2, 10) for length in range(1, 17)])
    assert torch.equal(batches[0]["attention_mask"].sum(dim=1), expected)


def test_texts_without_any_token_are_left_out_or_refused(tmp_path):
    save_language_tokenizer(tmp_path)
    source = BaseSource(str(tmp_path))
    (batch,) = batch_texts([[""] * 16 + ["red"]], source, None)
    assert batch["input_ids"].shape[0] == 1
    with pytest.raises(DataError, match="at least one token, got 3 rows without any"):
        batch_texts([["", "", ""]], source, None)


def test_a_tokenizer_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer of .* could not be loaded"):
        batch_texts([["red"]], BaseSource(str(tmp_path)), None)
