"""Columns of a split: values that fit, and messages about rows that do not."""

import json
from dataclasses import replace
from datetime import date
from decimal import Decimal
from functools import partial

import pyarrow as pa
import pytest

from dynlora.errors import DataError
from dynlora.train.data.columns import (
    check_column,
    name_classes,
    read_class_lists,
    read_classes,
    read_column,
    read_numbers,
    read_texts,
    read_vectors,
    read_words,
)
from tests.jobs import split_of


@pytest.mark.parametrize(
    ("read", "values", "expected"),
    [
        (partial(read_classes, num_labels=None), [0.0, 1.0], [0, 1]),
        (partial(read_classes, num_labels=None), [False, True], [0, 1]),
        (read_numbers, [1, -2, 0], [1.0, -2.0, 0.0]),
        (read_numbers, [Decimal("1.25")], [1.25]),
        (partial(read_class_lists, num_labels=2), [[0.0, 1.0], []], [[0, 1], []]),
        # Without `num_labels`, there may be as many classes as labels.
        (partial(read_class_lists, num_labels=None), [[0, 3, 1, 2]], [[0, 3, 1, 2]]),
    ],
)
def test_numbers_of_any_type_are_read(read, values, expected):
    assert read(split_of(c=values), "c") == expected


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
@pytest.mark.parametrize("several", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
def test_classes_are_named_by_texts_of_any_type(text, several):
    alone, lists = pa.array(["b", "a"], text), pa.array([["b", "c"], ["c", "a"]], several(text))
    split = split_of(c=alone, each=lists)
    assert read_classes(name_classes(split, split, "c")[0], "c", None) == [1, 0]
    named = name_classes(split, split, "each")[0]
    assert read_class_lists(named, "each", None) == [[1, 2], [2, 0]]


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (["01", "02", "0A"], [1, 2], [0, 1]),
        (["1.0", "2.0", "none"], [1.0, 2.0], [0, 1]),
        (["1", "2", "3"], [1.0, 3.0], [0, 2]),
        (["false", "mixture", "true"], [True, False], [2, 0]),
        (["2020-01-05", "never"], [date(2020, 1, 5)], [0]),
        (["bad", "good"], [1, 0], [1, 0]),
        (["bad", "good"], [Decimal("1.0"), Decimal("0.0")], [1, 0]),
    ],
)
def test_a_class_is_the_same_whatever_type_a_file_gives_it(names, values, expected):
    split = replace(split_of(c=values), class_names=names)
    assert read_classes(split, "c", len(names)) == expected


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (["1", "2", "3"], 0),
        (["01", "02", "0A"], 0),
        (["false", "true"], 0),
        (["01", "1"], 1),
        (["a", "b"], {"a": 1}),
    ],
)
def test_a_value_that_names_no_class_is_refused(names, value):
    split = replace(split_of(c=[value]), class_names=names)
    with pytest.raises(DataError, match=r"must hold one of the classes .* in row 0"):
        read_classes(split, "c", len(names))


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"feature": {"names": ["z", "a"], "_type": "ClassLabel"}, "_type": "List"}, ["z", "a"]),
        ({"dtype": "int64", "_type": "Value"}, None),
        ([], None),
        ({"names": 3}, None),
    ],
)
def test_lists_of_class_numbers_have_the_names_that_their_data_set_gives(metadata, names):
    split = split_of(each=[[0, 1], [1]])
    told = json.dumps({"info": {"features": {"each": metadata}}})
    table = split.table.replace_schema_metadata({"huggingface": told})
    named, _ = name_classes(replace(split, table=table), split, "each")
    assert named.class_names == names
    assert read_class_lists(named, "each", None) == [[0, 1], [1]]


@pytest.mark.parametrize(
    ("read", "values", "told"),
    [
        (partial(read_classes, num_labels=2), [0, 2], r"\[0, 1\], but 1 of 2 .*: 2 in row 1\."),
        (
            partial(read_classes, num_labels=None),
            [-1, 9],
            r"\[0, 1\], but 2 of 2 .*: -1 in row 0, 9 in row 1\. Renumber the classes, or set",
        ),
        (partial(read_classes, num_labels=2), [0, None], r"whole number .* 1 of 2 .*: None in row"),
        (read_numbers, [float("nan"), 1.0], r"but 1 of 2 .*: nan in row 0\."),
        (
            read_numbers,
            [1e300, float("-inf"), 3e38],
            r"finite float32 .*1e\+300 .*-inf in row 1",
        ),
        (read_numbers, ["0.5"], r"but 1 of 1 .*: '0\.5' in row 0\."),
        (read_numbers, [1.0, -100.0], r"other than -100.* 1 of 2 .*: -100\.0 in row 1\. Shift or"),
        (read_vectors, [[1.0, 2.0], [0.5, -100.0]], r"other than -100.* 1 of 2 .* in row 1\."),
        (
            partial(read_class_lists, num_labels=2),
            [[0.5], None, [1.0]],
            r"list of whole numbers .* 2 of 3 .*: \[0\.5\] in row 0, None in row 1\.",
        ),
        (partial(read_class_lists, num_labels=2), [0], r"list of whole numbers .*: 0 in row 0\."),
        (
            partial(read_class_lists, num_labels=2),
            [[0], [1, 2], [-1]],
            r"lists of classes in \[0, 1\], but 2 of 3 .*: \[1, 2\] in row 1, \[-1\] in row 2",
        ),
        (partial(read_class_lists, num_labels=None), [[], [2]], r"\[0, 1\], but 1 of 2 .*\[2\] in"),
        (read_words, [["a"], [], ["a", None]], r"list of words .* 2 of 3 .*: \[\] in row 1, \['a'"),
        (read_words, ["a b"], r"list of words .* 1 of 1 .*: 'a b' in row 0\. .*into words"),
        (
            lambda split, column: read_texts(split, "data.text", column),
            [None] * 9 + ["a"],
            r"text .* 9 of 10 rows .*None in row 4, \.{4} Re",
        ),
        (partial(read_classes, num_labels=2), ["a" * 500], r": 'a{56}\.\.\. in row 0\. "),
    ],
)
def test_other_values_are_counted_and_the_first_five_shown(read, values, told):
    with pytest.raises(DataError, match=told):
        read(split_of(c=values), "c")


def test_a_row_is_named_by_its_place_in_the_source():
    part = split_of(c=["a", "b", "c", None]).take([1, 3])
    with pytest.raises(DataError, match=r"1 of 2 rows of the training split .*None in row 3\."):
        read_texts(part, "data.text", "c")


def test_a_column_must_be_there_once_with_rows():
    with pytest.raises(DataError, match="training split must hold at least 1 row, got 0 in here"):
        check_column(split_of(c=[]), "data.text", "c")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["c", "c"])
    doubled = replace(split_of(c=["a"]), table=table)
    with pytest.raises(DataError, match=r"'c', which the training split .* more than once"):
        check_column(doubled, "data.text", "c")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (pa.array([2**31 - 1], pa.date32()), r"date32.*magnitude"),
        (pa.array([2**62], pa.timestamp("us")), r"timestamp"),
        (pa.StructArray.from_arrays([pa.array([1])] * 2, names=["a", "a"]), "duplicate field"),
    ],
    ids=str,
)
def test_values_that_python_does_not_have_are_refused(values: pa.Array, told: str) -> None:
    with pytest.raises(DataError, match=f"column 'c' of .* must hold .*{told}"):
        read_column(replace(split_of(c=[0]), table=pa.table({"c": values})), "data.text", "c")
