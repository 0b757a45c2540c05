"""Read and validate columns of a split; a `DataError` lists the invalid rows."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dynlora.errors import DataError
from dynlora.files.tables import shown_names
from dynlora.train.data.image_files import sort_names
from dynlora.train.data.splits import RawSplit

LABEL = "data.label"
UNLABELLED = -100
"""Label that the loss ignores."""
LARGEST = float(np.finfo(np.float32).max)
"""Largest valid number: labels are trained in float32."""
SHOWN = 5
MOST_NAMES = 20  # above it, there must be fewer class names than labels


def check_column(split: RawSplit, key: str, column: str) -> None:
    """Check that the column which configuration key `key` names is there once, with rows."""
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
    if split.table.num_rows == 0:
        raise DataError(
            f"the {split.name} split must hold at least 1 row, got 0 in {split.source}."
        )


def read_column(split: RawSplit, key: str, column: str) -> list[Any]:
    """Return the values of a column after `check_column`."""
    check_column(split, key, column)
    try:
        values: list[Any] = split.table[column].to_pylist()
    # Such as year 9,999,999, or an unknown time zone.
    except (ValueError, OverflowError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"column {column!r} of {split.source} must hold values that Python has, got a "
            f"{split.table[column].type} ({' '.join(str(error).split())}): write them as texts or "
            "numbers."
        ) from error
    return values


def read_texts(split: RawSplit, key: str, column: str) -> list[str]:
    """Return a column of texts."""
    values = read_column(split, key, column)
    required = f"column {column!r} must hold a text in every row"
    return _fitting(split, values, _is_text, required, "Remove these rows or fill them in.")


def read_prompts(split: RawSplit, columns: str | Sequence[str], separator: str) -> list[str]:
    """Return the prompts per row: the texts of one column, or of several that are not empty."""
    first, *others = (columns,) if isinstance(columns, str) else columns
    parts = [read_texts(split, "data.prompt", first)]
    for column in others:
        values = read_column(split, "data.prompt", column)
        parts.append(["" if value is None else str(value) for value in values])
    rows = zip(*parts, strict=True)
    return [separator.join([row[0], *filter(str.strip, row[1:])]) for row in rows]


def read_captions(split: RawSplit, key: str, column: str) -> list[list[str]]:
    """Return a column of captions, or of lists of them, as non-empty lists."""
    values = _fitting(
        split,
        read_column(split, key, column),
        lambda value: _is_text(value) or _is_list_of(value, _is_text, 1),
        f"column {column!r} must hold a caption, or a list of captions, in every row",
        "Remove these rows or fill them in.",
    )
    return [[value] if isinstance(value, str) else value for value in values]


def read_words(split: RawSplit, column: str) -> list[list[str]]:
    """Return the column `data.text` of non-empty lists of words."""
    return _fitting(
        split,
        read_column(split, "data.text", column),
        lambda value: _is_list_of(value, _is_text, 1),
        f"column {column!r} must hold a list of words in every row",
        "Remove these rows, or split their texts into words.",
    )


def read_numbers(split: RawSplit, column: str) -> list[float]:
    """Return the column `data.label` of finite float32 numbers other than -100."""
    required = f"label column {column!r} must hold, within float32, a finite number in every row"
    advice = "Remove these rows or fill them in."
    values = _fitting(split, read_column(split, LABEL, column), _is_number, required, advice)
    return _fitting(
        split,
        [float(value) for value in values],
        lambda number: number != UNLABELLED,
        f"label column {column!r} must hold numbers other than {UNLABELLED}, by which "
        "transformers marks what has no label",
        "Shift or scale the numbers.",
    )


def read_vectors(split: RawSplit, column: str) -> list[list[float]]:
    """Return the column `data.label` of lists of finite float32 numbers, all of one length."""
    values = _fitting(
        split,
        read_column(split, LABEL, column),
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


def name_classes(train: RawSplit, validation: RawSplit, column: str) -> tuple[RawSplit, RawSplit]:
    """Return both splits with class names: those of folders, or the sorted texts of `column`."""
    names = train.class_names
    if names is None and (found := _label_texts(train, column)):
        texts = {*found, *_label_texts(validation, column)}
        names = sort_names(text for text in texts if text.strip())
    return replace(train, class_names=names), replace(validation, class_names=names)


def _label_texts(split: RawSplit, column: str) -> list[str]:
    """Return the texts in a label column, or in its lists."""
    if split.table.column_names.count(column) != 1:
        return []  # refused where the column is read
    values = split.table[column]
    values = pc.list_flatten(values) if pa.types.is_list(values.type) else values
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    texts = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    return values.drop_null().to_pylist() if texts else []


def _numbered(split: RawSplit, values: list[Any]) -> list[Any]:
    """Replace class names by their numbers; other values stay."""
    places = {name: place for place, name in enumerate(split.class_names or ())}

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(each) for each in value]
        return places.get(str(value), value) if isinstance(value, str | int) else value

    return [number(value) for value in values]


def _class_words(split: RawSplit) -> tuple[str, str]:
    """Return the words for one class and for several, in errors."""
    names = "" if split.class_names is None else f"the classes {shown_names(split.class_names)}"
    return (f"one of {names}", names) if names else ("a whole number", "whole numbers")


def read_classes(split: RawSplit, column: str, num_labels: int | None) -> list[int]:
    """Return the column `data.label` of classes; `num_labels` is None if they determine it."""
    required = f"label column {column!r} must hold {_class_words(split)[0]} in every row"
    advice = "Number or name all classes, and remove rows without a label."
    labelled = _numbered(split, read_column(split, LABEL, column))
    values = _fitting(split, labelled, _is_whole, required, advice)
    labels = [int(value) for value in values]
    _refuse_classes(split, f"label column {column!r} must hold classes", labels, num_labels)
    return labels


def read_class_lists(split: RawSplit, column: str, num_labels: int | None) -> list[list[int]]:
    """Return the column `data.label` of lists of classes, like `read_classes`."""
    values = _fitting(
        split,
        _numbered(split, read_column(split, LABEL, column)),
        lambda value: _is_list_of(value, _is_whole),
        f"label column {column!r} must hold a list of {_class_words(split)[1]} in every row",
        "Number or name all classes, and give rows without any an empty list.",
    )
    labels = [[int(label) for label in value] for value in values]
    required = f"label column {column!r} must hold lists of classes"
    _refuse_classes(split, required, labels, num_labels)
    return labels


def _refuse_classes(
    split: RawSplit, required: str, labels: Sequence[Any], num_labels: int | None
) -> None:
    """Refuse classes out of range; without `num_labels`, above the number of labels.

    Such a class is probably an identifier, a year or a price.
    """
    rows = [row if isinstance(row, list) else [row] for row in labels]
    count, names = sum(map(len, rows)), split.class_names or ()
    if num_labels is None and len(names) > MOST_NAMES and len(names) >= count:
        raise DataError(
            f"{required}, but {split.source} has {len(names)} different texts for {count} labels, "
            f"such as {short(names[0])}. Name the column of the classes with `data.label`."
        )
    high = (max(count, 2) if num_labels is None else num_labels) - 1
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
    """Raise a `DataError` that shows the first invalid values and their rows, if there are any."""
    if not faults:
        return
    shown = ", ".join(f"{show(value)} in row {split.rows[row]}" for row, value in faults[:SHOWN])
    more = ", ..." if len(faults) > SHOWN else ""
    raise DataError(
        f"{required}, but {len(faults)} of {split.table.num_rows} rows of the {split.name} split "
        f"({split.source}, rows counted from 0) do not: {shown}{more}. {advice}"
    )


def _fitting(
    split: RawSplit, values: list[Any], fits: Callable[[Any], bool], required: str, advice: str
) -> list[Any]:
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
