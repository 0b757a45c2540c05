"""Rows to model inputs: checked columns, tokens, and the number of texts that were cut.

Everything a user can get wrong about columns and labels is found here, before training starts.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.sources import RawSplit, load_splits

logger = logging.getLogger(__name__)

SHOWN = 5
"""Faulty rows or labels that a message lists before it only counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The checked columns of one split."""

    texts: list[str]
    pairs: list[str] | None
    """Second texts; None where there is one text."""
    labels: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """Model inputs of both splits."""

    train: Any
    """`datasets.Dataset` with `labels` and the tokenizer's columns."""
    validation: Any
    """As `train`."""
    num_labels: int
    cut: Mapping[str, int]
    """Texts longer than the maximum length, by split."""


def load_task(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Load, check and tokenize both splits; say once how many texts were cut.

    Raises:
        DataError: If a column or split is missing, a split is empty, a text is missing or a label
            is missing, not whole or out of range.
    """
    train_split, validation_split = load_splits(config)
    train = check_rows(train_split, config, config.num_labels)
    num_labels = config.num_labels or max(max(train.labels) + 1, 2)
    validation = check_rows(validation_split, config, num_labels)
    train_inputs, train_cut = tokenize(train, tokenizer, config.max_length)
    validation_inputs, validation_cut = tokenize(validation, tokenizer, config.max_length)
    if train_cut + validation_cut:
        logger.warning(
            "%d of %d training and %d of %d validation inputs are longer than "
            "data.max_length=%d tokens and were cut.",
            train_cut, len(train.labels), validation_cut, len(validation.labels), config.max_length,
        )  # fmt: skip
    return TaskData(
        train=train_inputs,
        validation=validation_inputs,
        num_labels=num_labels,
        cut={"train": train_cut, "validation": validation_cut},
    )


def check_rows(split: RawSplit, config: DataConfig, num_labels: int | None) -> Rows:
    """Return the split's texts and labels.

    Args:
        split: As found.
        config: Names of the columns.
        num_labels: Number of classes; None where the training labels decide it.

    Raises:
        DataError: See `load_task`.
    """
    named = {"data.text": config.text, "data.label": config.label}
    if config.text_pair is not None:
        named["data.text_pair"] = config.text_pair
    for key, column in named.items():
        if column not in split.table.column_names:
            near = difflib.get_close_matches(column, split.table.column_names, n=1)
            raise DataError(
                f"`{key}` names the column {column!r}, which the {split.name} split "
                f"({split.source}) does not have: its columns are "
                f"{', '.join(split.table.column_names)}."
                + (f" The nearest is {near[0]!r}." if near else "")
            )
        if split.table.column_names.count(column) > 1:
            raise DataError(
                f"`{key}` must name one column, got {column!r}, which the {split.name} split "
                f"({split.source}) has more than once: rename all but one."
            )
    if split.table.num_rows == 0:
        raise DataError(
            f"the {split.name} split must hold at least 1 row, got 0 in {split.source}."
        )
    pairs = None if config.text_pair is None else _texts(split, config.text_pair)
    labels = _labels(split, config.label, num_labels)
    return Rows(texts=_texts(split, config.text), pairs=pairs, labels=labels)


def _texts(split: RawSplit, column: str) -> list[str]:
    values: list[Any] = split.table[column].to_pylist()
    _refuse(
        split,
        f"column {column!r} must hold a text in every row",
        [(row, value) for row, value in enumerate(values) if not isinstance(value, str)],
        "Remove these rows or fill them in.",
    )
    return values


def _labels(split: RawSplit, column: str, num_labels: int | None) -> list[int]:
    values: list[Any] = split.table[column].to_pylist()
    _refuse(
        split,
        f"label column {column!r} must hold a whole number in every row",
        [(row, value) for row, value in enumerate(values) if not _is_whole(value)],
        "Number the classes 0, 1, 2, ... and remove rows without a label.",
    )
    labels = [int(value) for value in values]
    # Without a number given, more classes than rows are no classes: identifiers, years, prices.
    high = max(len(labels), 2) - 1 if num_labels is None else num_labels - 1
    _refuse(
        split,
        f"label column {column!r} must hold classes in [0, {high}]",
        [(row, label) for row, label in enumerate(labels) if not 0 <= label <= high],
        "Renumber the classes, or set `data.num_labels`.",
    )
    return labels


def _is_whole(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _refuse(split: RawSplit, required: str, faults: Sequence[tuple[int, Any]], advice: str) -> None:
    """Raise a `DataError` that counts and shows the faulty rows, if there are any."""
    if not faults:
        return
    shown = ", ".join(f"{value!r} in row {split.rows[row]}" for row, value in faults[:SHOWN])
    more = ", ..." if len(faults) > SHOWN else ""
    raise DataError(
        f"{required}, but {len(faults)} of {split.table.num_rows} rows of the {split.name} split "
        f"({split.source}, rows counted from 0) do not: {shown}{more}. {advice}"
    )


def tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Any, int]:
    """Return the split as model inputs, cut at `max_length` tokens, and how many were cut.

    Inputs are first cut one token too late: what is then too long is what had to be cut.
    """

    def encode(texts: list[str], pairs: list[str] | None, limit: int) -> dict[str, list[Any]]:
        return dict(tokenizer(texts, pairs, truncation=True, max_length=limit))

    columns = encode(rows.texts, rows.pairs, max_length + 1)
    long = [row for row, ids in enumerate(columns["input_ids"]) if len(ids) > max_length]
    if long:
        pairs = None if rows.pairs is None else [rows.pairs[row] for row in long]
        again = encode([rows.texts[row] for row in long], pairs, max_length)
        for name, values in again.items():
            for row, value in zip(long, values, strict=True):
                columns[name][row] = value
    return datasets.Dataset.from_dict({**columns, "labels": rows.labels}), len(long)
