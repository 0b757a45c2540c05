"""Read and validate the columns of a split before training.

Each reader returns one value per row, or raises a `DataError` that lists the invalid rows.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dynlora.errors import DataError
from dynlora.files.tables import column_values, shown_names
from dynlora.train.data.splits import RawSplit

UNLABELLED = -100
"""Label that the loss ignores."""
LARGEST = float(np.finfo(np.float32).max)
"""Largest valid number: labels are trained in float32."""
SHOWN = 5
"""Maximum number of invalid rows listed in a message."""


def check_columns(split: RawSplit, named: Mapping[str, str | None]) -> None:
    """Check that a split has rows, and each named column exactly once.

    Args:
        split: The split.
        named: Column per configuration key; None if the key is unset.

    Raises:
        DataError: If it does not.
    """
    for key, column in named.items():
        if column is not None:
            _check_column(split, key, column)
    if split.table.num_rows == 0:
        raise DataError(
            f"the {split.name} split must hold at least 1 row, got 0 in {split.source}."
        )


def _check_column(split: RawSplit, key: str, column: str) -> None:
    found = split.table.column_names
    if column not in found:
        near = difflib.get_close_matches(column, found, n=1)
        raise DataError(
            f"`{key}` names the column {column!r}, which the {split.name} split ({split.source}) "
            f"does not have: its columns are {shown_names(found)}."
            + (f" The nearest is {near[0]!r}." if near else "")
        )
    if found.count(column) > 1:
        raise DataError(
            f"`{key}` must name one column, got {column!r}, which the {split.name} split "
            f"({split.source}) has more than once: rename all but one."
        )


def read_texts(split: RawSplit, column: str) -> list[str]:
    """Return a column of texts."""
    required = f"column {column!r} must hold a text in every row"
    return _read(split, column, _is_text, required, "Remove these rows or fill them in.")


def read_words(split: RawSplit, column: str) -> list[list[str]]:
    """Return a column of non-empty lists of words."""
    required = f"column {column!r} must hold a list of words in every row"
    advice = "Remove these rows, or split their texts into words."
    return _read(split, column, lambda value: _is_list_of(value, _is_text, 1), required, advice)


def read_numbers(split: RawSplit, column: str) -> list[float]:
    """Return a column of finite float32 numbers other than -100."""
    required = f"label column {column!r} must hold, within float32, a finite number in every row"
    values = _read(split, column, _is_number, required, "Remove these rows or fill them in.")
    numbers = [float(value) for value in values]
    refuse_rows(
        split,
        f"label column {column!r} must hold numbers other than {UNLABELLED}, by which "
        "transformers marks what has no label",
        [(row, number) for row, number in enumerate(numbers) if number == UNLABELLED],
        "Shift or scale the numbers.",
    )
    return numbers


def read_vectors(split: RawSplit, column: str) -> list[list[float]]:
    """Return a column of lists of finite float32 numbers, all of the same length."""
    values = _read(
        split,
        column,
        lambda value: _is_list_of(value, _is_number, 1),
        f"label column {column!r} must hold, within float32, a list of finite numbers in every row",
        "Remove these rows or fill them in.",
    )
    vectors = [[float(number) for number in value] for value in values]
    length = len(vectors[0])
    refuse_rows(
        split,
        f"label column {column!r} must hold lists of one length, {length} as in the first row",
        [(row, len(vector)) for row, vector in enumerate(vectors) if len(vector) != length],
        "Use one model's vectors for all rows.",
        show=lambda count: f"{count} numbers",
    )
    return vectors


def read_classes(split: RawSplit, column: str, num_labels: int | None) -> list[int]:
    """Return a column of classes; `num_labels` is None if these labels determine it."""
    required = f"label column {column!r} must hold a whole number in every row"
    advice = "Number the classes 0, 1, 2, ... and remove rows without a label."
    labels = [int(value) for value in _read(split, column, _is_whole, required, advice)]
    _refuse_classes(split, f"label column {column!r} must hold classes", labels, num_labels)
    return labels


def read_class_lists(split: RawSplit, column: str, num_labels: int | None) -> list[list[int]]:
    """Return a column of lists of classes; `num_labels` is None if these labels determine it."""
    required = f"label column {column!r} must hold a list of whole numbers in every row"
    advice = "Number the classes 0, 1, 2, ... and give rows without any an empty list."
    values = _read(split, column, lambda value: _is_list_of(value, _is_whole), required, advice)
    labels = [[int(label) for label in value] for value in values]
    required = f"label column {column!r} must hold lists of classes"
    _refuse_classes(split, required, labels, num_labels)
    return labels


def _refuse_classes(
    split: RawSplit, required: str, labels: Sequence[Any], num_labels: int | None
) -> None:
    """Refuse rows with a class outside the classes.

    Without `num_labels`, a class above the number of labels is probably an identifier, a year or
    a price.
    """
    rows = [row if isinstance(row, list) else [row] for row in labels]
    high = (max(sum(map(len, rows)), 2) if num_labels is None else num_labels) - 1
    refuse_rows(
        split,
        f"{required} in [0, {high}]",
        [(n, labels[n]) for n, row in enumerate(rows) if any(not 0 <= x <= high for x in row)],
        "Renumber the classes, or set `data.num_labels`.",
    )


def short(value: object) -> str:
    """Return the `repr` of a value, truncated to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_rows(
    split: RawSplit,
    required: str,
    faults: Sequence[tuple[int, Any]],
    advice: str,
    show: Callable[[Any], str] = short,
) -> None:
    """Raise a `DataError` that counts and lists the invalid rows, if there are any.

    Args:
        split: The split.
        required: The requirement, as the beginning of the message.
        faults: Row in the split, counted from 0, and its invalid value.
        advice: Sentence that explains the remedy.
        show: Formats an invalid value.

    Raises:
        DataError: If there are faults.
    """
    if not faults:
        return
    shown = ", ".join(f"{show(value)} in row {split.rows[row]}" for row, value in faults[:SHOWN])
    more = ", ..." if len(faults) > SHOWN else ""
    raise DataError(
        f"{required}, but {len(faults)} of {split.table.num_rows} rows of the {split.name} split "
        f"({split.source}, rows counted from 0) do not: {shown}{more}. {advice}"
    )


def _read(
    split: RawSplit, column: str, fits: Callable[[Any], bool], required: str, advice: str
) -> list[Any]:
    values = column_values(split.table, column, split.source)
    faults = [(row, value) for row, value in enumerate(values) if not fits(value)]
    refuse_rows(split, required, faults, advice)
    return values


def _is_list_of(value: object, fits: Callable[[Any], bool], low: int = 0) -> bool:
    return isinstance(value, list) and len(value) >= low and all(map(fits, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST
