"""Read and validate columns of a split; a `DataError` lists the invalid rows."""

import difflib
import json
import re
from collections import Counter
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
UNLABELLED = -100  # label that the loss ignores
LARGEST = float(np.finfo(np.float32).max)  # largest valid number: labels are trained in float32
SHOWN = 5
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
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
    cells = split.table[column]
    try:
        if pa.types.is_decimal(cells.type):
            cells = cells.cast(pa.float64())
        values: list[Any] = cells.to_pylist()
    # Such as year 9,999,999, or an unknown time zone.
    except (ValueError, OverflowError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"column {column!r} of {split.source} must hold values that Python has, got a "
            f"{cells.type} ({' '.join(str(error).split())}): write them as texts or "
            "numbers."
        ) from error
    return values


def _read(
    split: RawSplit,
    key: str,
    column: str,
    fits: Callable[[Any], bool],
    required: str,
    advice: str = "Remove these rows or fill them in.",
    values: list[Any] | None = None,
) -> list[Any]:
    """Return the values of a column, or given ones; `required` is what each row must hold."""
    values = read_column(split, key, column) if values is None else values
    faults = [(row, value) for row, value in enumerate(values) if not fits(value)]
    label = "label " if key == LABEL else ""
    required = f"{label}column {column!r} must hold {required} in every row"
    refuse_rows(split, required, faults, advice)
    return values


def read_texts(split: RawSplit, key: str, column: str) -> list[str]:
    """Return a column of texts."""
    return _read(split, key, column, _is_text, "a text")


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
    several, required = _lists_of(_is_text), "a caption, or a list of captions,"
    values = _read(split, key, column, lambda each: _is_text(each) or several(each), required)
    return [[value] if isinstance(value, str) else value for value in values]


def read_words(split: RawSplit, column: str) -> list[list[str]]:
    """Return the column `data.text` of non-empty lists of words."""
    advice = "Remove these rows, or split their texts into words."
    return _read(split, "data.text", column, _lists_of(_is_text), "a list of words", advice)


def read_numbers(split: RawSplit, column: str) -> list[float]:
    """Return the column `data.label` of finite float32 numbers other than -100."""
    values = _read(split, LABEL, column, _is_number, "a finite float32 number")
    _refuse_unlabelled(split, column, [[value] for value in values])
    return [float(value) for value in values]


def _refuse_unlabelled(split: RawSplit, column: str, rows: Sequence[Sequence[float]]) -> None:
    refuse_rows(
        split,
        f"label column {column!r} must hold numbers other than {UNLABELLED}, by which "
        "transformers marks what has no label",
        [(row, float(UNLABELLED)) for row, values in enumerate(rows) if UNLABELLED in values],
        "Shift or scale the numbers.",
    )


def read_vectors(split: RawSplit, column: str) -> list[list[float]]:
    """Return the column `data.label` of lists of finite float32 numbers, all of one length."""
    values = _read(split, LABEL, column, _lists_of(_is_number), "a list of finite float32 numbers")
    length = len(values[0])
    refuse_rows(
        split,
        f"label column {column!r} must hold lists of one length, {length} as in the first row",
        [(row, len(vector)) for row, vector in enumerate(values) if len(vector) != length],
        "Use one model's vectors for all rows.",
        show=lambda count: f"{count} numbers",
    )
    _refuse_unlabelled(split, column, values)
    return [[float(number) for number in value] for value in values]


def name_classes(train: RawSplit, validation: RawSplit, column: str) -> tuple[RawSplit, RawSplit]:
    """Return both splits with class names: given ones, or the sorted texts of `column`."""
    names = train.class_names or _given_names(train, column)
    if names is None and (found := _label_texts(train, column)):
        texts = {*found, *_label_texts(validation, column)}
        names = sort_names(text for text in texts if text.strip()) or None
    return replace(train, class_names=names), replace(validation, class_names=names)


def _given_names(split: RawSplit, column: str) -> list[str] | None:
    """Return the names that `datasets` stores in a table beside a column of class numbers."""
    try:
        features = json.loads(split.table.schema.metadata[b"huggingface"])["info"]["features"]
        feature = features[column]
        return [*map(str, feature.get("feature", feature)["names"])] or None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # of another writer
        return None


def _label_texts(split: RawSplit, column: str) -> list[str]:
    """Return the texts in a label column, or in its lists."""
    if split.table.column_names.count(column) != 1:
        return []  # refused where the column is read
    values = split.table[column]
    if isinstance(values.type, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        values = pc.list_flatten(values)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    texts = values.type in (pa.string(), pa.large_string(), pa.string_view())
    return values.drop_null().to_pylist() if texts else []


def _numbered(split: RawSplit, column: str) -> list[Any]:
    """Return a label column with class names replaced by their numbers; other values stay.

    Each file of CSV has types of its own: `01` is a text beside `0A`, else a number. So such names
    are found by their values, and then no other number is the number of a class.
    """
    found = read_column(split, LABEL, column)
    if not split.class_names:
        return found
    places = {name: place for place, name in enumerate(split.class_names)}
    given: dict[Any, str] = dict(enumerate(_given_names(split, column) or ()))
    values = {name: _in_file(name) for name in places}
    counts = Counter(values.values())  # 1 and 01 have one value, which tells neither
    by_value = {value: places[name] for name, value in values.items() if counts[value] == 1}
    untold = all(isinstance(value, str) for value in counts)

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(each) for each in value]
        if value is None or isinstance(value, dict):
            return value
        name = given.get(value, value)
        if isinstance(name, str):
            return places.get(name, name)
        return by_value.get(_in_file(str(name)), name if untold else str(name))

    return [number(value) for value in found]


def _in_file(name: str) -> Any:
    """Return a class name as a file of nothing but such texts has it."""
    if name.lower() in ("true", "false"):
        return ("boolean", name.lower())  # not 1 or 0
    return float(name) if NUMBER.fullmatch(name) else name


def _class_words(split: RawSplit) -> tuple[str, str]:
    """Return the words for one class and for several, in errors."""
    names = "" if split.class_names is None else f"the classes {shown_names(split.class_names)}"
    return (f"one of {names}", names) if names else ("a whole number", "whole numbers")


def read_classes(split: RawSplit, column: str, num_labels: int | None) -> list[int]:
    """Return the column `data.label` of classes; `num_labels` is None if they determine it."""
    advice = "Number or name all classes, and remove rows without a label."
    required, values = _class_words(split)[0], _numbered(split, column)
    labels = [*map(int, _read(split, LABEL, column, _is_whole, required, advice, values))]
    _refuse_classes(split, f"label column {column!r} must hold classes", labels, num_labels)
    return labels


def read_class_lists(split: RawSplit, column: str, num_labels: int | None) -> list[list[int]]:
    """Return the column `data.label` of lists of classes, like `read_classes`."""
    advice = "Number or name all classes, and give rows without any an empty list."
    required, values = f"a list of {_class_words(split)[1]}", _numbered(split, column)
    fits = _lists_of(_is_whole, least=0)
    values = _read(split, LABEL, column, fits, required, advice, values)
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
    shown = ", ".join(
        f"{show(value)} in row {split.row_numbers[row]}" for row, value in faults[:SHOWN]
    )
    more = ", ..." if len(faults) > SHOWN else ""
    raise DataError(
        f"{required}, but {len(faults)} of {split.table.num_rows} rows of the {split.name} split "
        f"({split.source}, rows counted from 0) do not: {shown}{more}. {advice}"
    )


def _lists_of(fits: Callable[[Any], bool], least: int = 1) -> Callable[[Any], bool]:
    """Return whether a value is a list of so many values that fit."""
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(fits, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST
