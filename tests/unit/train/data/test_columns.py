"""Columns of a split: what a row must hold, and what is said of rows that do not."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from dynlora.errors import DataError
from dynlora.train.data.columns import (
    check_columns,
    read_class_lists,
    read_classes,
    read_numbers,
    read_texts,
    read_words,
)
from dynlora.train.data.splits import RawSplit


def split(**columns: list[Any]) -> RawSplit:
    table = pa.table(columns)
    return RawSplit(name="training", source="here", table=table, rows=range(table.num_rows))


def test_whole_numbers_of_any_type_are_classes() -> None:
    for labels in ([0, 1], [0.0, 1.0], [False, True]):
        assert read_classes(split(label=labels), "label", None) == [0, 1]


@pytest.mark.parametrize(
    ("labels", "num_labels", "told"),
    [
        ([0, 2], 2, r"\[0, 1\], but 1 of 2 .*: 2 in row 1\."),
        ([-1, -1], None, r"\[0, 1\], but 2 of 2 .*: -1 in row 0, -1 in row 1\."),
        ([1, 9], None, r"\[0, 1\], but 1 of 2 .*: 9 in row 1\. Renumber the classes, or set"),
        ([0, None], 2, r"whole number in every row, but 1 of 2 .*: None in row 1\."),
        (["a", "b"], None, r"whole number .*: 'a' in row 0, 'b' in row 1\."),
    ],
)
def test_other_classes_are_shown_with_their_rows(
    labels: list[Any], num_labels: int | None, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        read_classes(split(label=labels), "label", num_labels)


def test_numbers_may_be_of_any_type_and_sign() -> None:
    assert read_numbers(split(label=[1, -2, 0]), "label") == [1.0, -2.0, 0.0]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([float("nan"), 1.0], r"but 1 of 2 .*: nan in row 0\."),
        ([float("inf"), float("-inf")], r"but 2 of 2 .*: inf in row 0, -inf in row 1\."),
        ([1e300, 3e38], r"within float32, a finite .* but 1 of 2 .*: 1e\+300 in row 0\."),
        (["0.5", "1"], r"but 2 of 2 .*: '0\.5' in row 0, '1' in row 1\."),
        ([1.0, -100.0], r"other than -100.* but 1 of 2 .*: -100\.0 in row 1\. Shift or scale"),
    ],
)
def test_what_is_no_number_to_learn_is_shown_with_its_row(labels: list[Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_numbers(split(label=labels), "label")


def test_lists_of_classes_may_be_empty_and_of_any_whole_type() -> None:
    assert read_class_lists(split(label=[[0, 2], [], [1]]), "label", None) == [[0, 2], [], [1]]
    assert read_class_lists(split(label=[[0.0, 1.0], []]), "label", 2) == [[0, 1], []]


@pytest.mark.parametrize(
    ("labels", "num_labels", "told"),
    [
        ([[0], None], 2, r"list of whole numbers in every row, but 1 of 2 .*: None in row 1\."),
        ([[0.5], [1.0]], 2, r"list of whole numbers .* 1 of 2 .*: \[0\.5\] in row 0\."),
        ([0, 1], 2, r"list of whole numbers .* 2 of 2 .*: 0 in row 0, 1 in row 1\."),
        ([[0], [1, 2]], 2, r"lists of classes in \[0, 1\], but 1 of 2 .*: \[1, 2\] in row 1\."),
        ([[-1], []], None, r"lists of classes in \[0, 1\], but 1 of 2 .*: \[-1\] in row 0\."),
        ([[], [2024]], None, r"\[0, 1\], but 1 of 2 .*: \[2024\] in row 1\. Renumber"),
    ],
)
def test_other_lists_of_classes_are_shown_with_their_rows(
    labels: list[Any], num_labels: int | None, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        read_class_lists(split(label=labels), "label", num_labels)


@pytest.mark.parametrize(
    ("read", "values", "told"),
    [
        (read_texts, ["a", None], r"a text in every row, but 1 of 2 .*: None in row 1\."),
        (read_words, [["a"], []], r"list of words .* 1 of 2 .*: \[\] in row 1\."),
        (read_words, [["a", None]], r"list of words .* 1 of 1 .*: \['a', None\] in row 0\."),
        (read_words, ["a b"], r"list of words .* 1 of 1 .*: 'a b' in row 0\. .*into words"),
    ],
)
def test_texts_and_words_that_are_missing_are_shown_with_their_rows(
    read: Callable[[RawSplit, str], Any], values: list[Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        read(split(text=values), "text")


def test_at_most_five_faults_are_shown_and_all_are_counted() -> None:
    faulty = split(text=[None] * 9 + ["a"])
    with pytest.raises(DataError, match=r"9 of 10 rows .*None in row 4, \.\.\.") as error:
        read_texts(faulty, "text")
    assert "in row 5" not in str(error.value)


def test_a_row_is_named_by_where_it_stood_in_its_source() -> None:
    part = split(text=["a", "b", "c", None]).take([1, 3])
    with pytest.raises(DataError, match=r"1 of 2 rows of the training split .*None in row 3\."):
        read_texts(part, "text")


def test_a_long_value_is_shown_by_its_beginning() -> None:
    with pytest.raises(DataError, match=r": 'a{3,}\.\.\. in row 0\.") as error:
        read_classes(split(label=["a" * 500]), "label", None)
    assert len(str(error.value)) < 400


def test_a_column_that_is_missing_is_told_with_the_nearest_there_is() -> None:
    with pytest.raises(DataError, match=r"`data\.text` .* 'txt', .*: its columns are text, label"):
        check_columns(split(text=["a"], label=[0]), {"data.text": "txt"})
    with pytest.raises(DataError, match=r"The nearest is 'text'\."):
        check_columns(split(text=["a"], label=[0]), {"data.text": "txt"})
    check_columns(split(text=["a"]), {"data.text": "text", "data.text_pair": None})


def test_a_column_that_stands_twice_is_refused() -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    doubled = RawSplit(name="training", source="here", table=table, rows=range(1))
    with pytest.raises(DataError, match=r"'text', which the training split .* more than once"):
        check_columns(doubled, {"data.text": "text"})


def test_a_split_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="training split must hold at least 1 row, got 0 in here"):
        check_columns(split(text=[]), {"data.text": "text"})


def test_lists_may_name_as_many_classes_as_there_are_labels() -> None:
    assert read_class_lists(split(label=[[0, 3, 1, 2]]), "label", None) == [[0, 3, 1, 2]]
    with pytest.raises(DataError, match=r"in \[0, 3\], but 1 of 1 .*: \[0, 4, 1, 2\] in row 0"):
        read_class_lists(split(label=[[0, 4, 1, 2]]), "label", None)
