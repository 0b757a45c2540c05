"""Read a file of texts into tokenized batches for a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor
from transformers import AutoTokenizer

from dynlora.adapter_files.base import BaseSource
from dynlora.adapter_files.base_models import UNLOADABLE
from dynlora.adapter_files.tables import TABLES, column_values, read_table, shown_names
from dynlora.errors import AdapterError, DataError

READS_TEXTS = "input_ids"
"""Main input of text models in transformers."""
MAX_LENGTH = 512
"""Maximum number of tokens per text."""
BATCH = 16


def read_texts(path: Path, columns: Mapping[str, str], rows: int) -> list[list[str]]:
    """Read columns of texts, from at most `rows` rows spread evenly over the file.

    Args:
        path: A Parquet, CSV or JSON Lines file.
        columns: One or two column names, by command-line option.
        rows: At least 1.

    Returns:
        A list of texts per column.

    Raises:
        DataError: If the file is unreadable or has no rows, or a column is missing or not of texts.
    """
    table = _read_table(path, [*columns.values()])
    if not table.num_rows:
        raise DataError(f"`--data` must hold at least 1 row, got 0 in {path}.")
    step = max(1, table.num_rows / rows)
    picked = sorted({int(row * step) for row in range(min(rows, table.num_rows))})
    return [_take_column(table, option, column, picked, path) for option, column in columns.items()]


def check_reads_texts(base: Any, source: BaseSource) -> None:
    """Check that a base model reads texts.

    Raises:
        AdapterError: If it reads images or audio.
    """
    if base.main_input_name != READS_TEXTS:
        raise AdapterError(
            f"`--data` holds texts, so the base model must read texts, got {source.path}, a "
            f"{type(base).__name__}, which reads {base.main_input_name}"
            f"{' of images' if base.main_input_name == 'pixel_values' else ''}: leave out "
            "`--data`, and the adapter is cut by its own numbers alone."
        )


def batch_texts(
    columns: Sequence[Sequence[str]], source: BaseSource, limit: int | None
) -> list[dict[str, Tensor]]:
    """Tokenize texts into batches of arguments for a model's `forward`.

    Args:
        columns: Texts, and the second texts of pairs, if any.
        source: The base model, whose tokenizer is used.
        limit: Maximum number of positions of the model; None if unlimited.

    Raises:
        DataError: If the tokenizer cannot be loaded or cannot pad, or the texts have no tokens.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source.place, **source.options)
    except UNLOADABLE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the tokenizer of {source.path} could not be loaded: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise DataError(f"the tokenizer of {source.path} must have a padding token, got none.")
    longest = min(MAX_LENGTH, limit or MAX_LENGTH, tokenizer.model_max_length)
    batches = []
    for start in range(0, len(columns[0]), BATCH):
        texts = [list(column[start : start + BATCH]) for column in columns]
        encoded = tokenizer(
            *texts, truncation=True, max_length=longest, padding=True, return_tensors="pt"
        )
        if encoded["input_ids"].shape[1]:  # empty texts may have no tokens
            batches.append(dict(encoded))
    if not batches:
        raise DataError(
            f"`--data` must have texts with at least one token, got {len(columns[0])} rows without "
            "any: name another column with `--text`."
        )
    return batches


def _read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    if path.suffix not in TABLES:
        raise DataError(f"`--data` must end in {', '.join(TABLES)}, got {path}: convert it.")
    if not path.is_file():
        raise DataError(f"`--data` must be a file, got {path}, which is none.")
    return read_table(path, columns, TABLES)


def _take_column(
    table: pa.Table, option: str, column: str, rows: Sequence[int], path: Path
) -> list[str]:
    if table.column_names.count(column) != 1:
        raise DataError(
            f"`{option}` must be a column of {path}, there once, got {column!r}; its columns are "
            f"{shown_names(table.column_names)}."
        )
    values: list[str] = column_values(table.select([column]).take(rows), column, str(path))
    for row, value in zip(rows, values, strict=True):
        if type(value) is not str:
            raise DataError(
                f"column {column!r} of {path} must hold texts, got {value!r} in row {row}: mend or "
                "remove the row."
            )
    return values
