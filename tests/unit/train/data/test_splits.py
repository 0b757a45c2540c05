"""Where rows come from."""

from dataclasses import replace

import pytest

from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.splits import find_rows, load_splits, read_file
from tests.jobs import write_rows
from tests.language import write_two_splits

ROWS = [{"text": f"number {n}", "label": n % 2} for n in range(20)]


def column(split, name="text"):
    return split.table[name].to_pylist()


def test_answers_and_prompts_are_texts_also_where_all_are_numbers(tmp_path):
    columns = ("prompt", "chosen", "rejected", "text")
    file = write_rows(tmp_path / "a.csv", [dict.fromkeys(columns, number) for number in (4, 5)])
    found = read_file("given", file, DataConfig(path=str(file))).table.to_pydict()
    assert found == {name: ["4", "5"] for name in columns}


def test_two_files_of_the_same_split_are_refused(tmp_path):
    for name in ("train.csv", "train.jsonl", "validation.csv"):
        write_rows(tmp_path / name, ROWS)
    with pytest.raises(DataError, match=r"got 2 .*train\.csv, train\.jsonl, validation\.csv"):
        load_splits(DataConfig(path=str(tmp_path)))


def test_a_single_file_is_split_without_overlap_and_always_alike(tmp_path):
    path = write_rows(tmp_path / "all.jsonl", ROWS)
    config = DataConfig(path=str(path), validation_fraction=0.3)
    train, validation = load_splits(config)
    assert (train.table.num_rows, validation.table.num_rows) == (14, 6)
    assert column(validation) == [f"number {row}" for row in validation.row_numbers]
    assert set(column(train)) | set(column(validation)) == {row["text"] for row in ROWS}
    assert set(column(train)) & set(column(validation)) == set()
    again = load_splits(config)
    assert (column(again[0]), column(again[1])) == (column(train), column(validation))


def test_rows_held_out_of_train_are_the_same_with_any_other_setting(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    config = DataConfig(path=str(tmp_path), validation_rows_from_train=6)
    train, validation = load_splits(config)
    assert (train.name, validation.name) == ("training", "validation")
    assert (train.table.num_rows, validation.table.num_rows) == (14, 6)
    assert set(train.row_numbers) | set(validation.row_numbers) == set(range(20))
    small, again = load_splits(replace(config, max_train_rows=5, label="text", max_length=64))
    assert again.row_numbers == validation.row_numbers
    assert small.table.num_rows == 5
    assert set(small.row_numbers) < set(train.row_numbers)
    assert column(validation) == [f"number {row}" for row in validation.row_numbers]
    with pytest.raises(DataError, match=r"rows_from_train` must leave .* got 20 of the 20 rows"):
        load_splits(replace(config, validation_rows_from_train=20))
    write_rows(tmp_path / "validation.jsonl", ROWS[:4])
    config = replace(config, max_validation_rows=3, max_train_rows=5)
    train, validation = load_splits(config)
    assert find_rows(config, None, None).row_numbers == validation.row_numbers
    assert find_rows(config, "train", None).row_numbers == train.row_numbers
    assert column(find_rows(config, "validation", None)) == [f"number {n}" for n in range(4)]


def test_a_sample_is_random_in_the_files_order_and_the_same_for_any_seed(tmp_path):
    write_two_splits(tmp_path, ROWS)
    train, _ = load_splits(DataConfig(path=str(tmp_path), max_train_rows=7))
    assert train.table.num_rows == 7
    assert list(train.row_numbers) == sorted(train.row_numbers)
    assert list(train.row_numbers) != list(range(7))
    whole, _ = load_splits(DataConfig(path=str(tmp_path), max_train_rows=20))
    assert column(whole) == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"), [(1, 0.5, 0), (5, 0.1, 1), (5, 0.5, 2), (5, 0.99, 4)]
)
def test_of_a_file_of_few_rows_at_least_one_is_held_out_and_one_is_left(
    tmp_path, rows, fraction, held_out
):
    path = write_rows(tmp_path / "all.csv", ROWS[:rows])
    train, validation = load_splits(DataConfig(path=str(path), validation_fraction=fraction))
    assert (len(column(train)), len(column(validation))) == (rows - held_out, held_out)
