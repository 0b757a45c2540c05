"""Files of rows to tables: one reader a format, for all that reads rows from a disk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from dynlora.errors import DataError

Reader = Callable[[Path, Sequence[str]], pa.Table]
"""Reads a file, given its columns of texts, some of which may look like numbers."""


def read_table(path: Path, texts: Sequence[str], readers: Mapping[str, Reader]) -> pa.Table:
    """Read a file to its last byte.

    Args:
        path: The file.
        texts: Columns that hold texts.
        readers: `TABLES`, or `AS_WRITTEN` where the cells are handed on; by the file's ending.

    Raises:
        DataError: If it is unreadable, or empty.
    """
    try:
        table = readers[path.suffix](path, texts)
        # Texts are not looked at when they are read, nor are the columns' names.
        table.validate(full=True)
        table.column_names  # noqa: B018  decodes them
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if path.stat().st_size == 0:
            raise DataError(f"a split must hold at least 1 row, got 0 in {path}.") from error
        reason = " ".join(str(error).split())
        raise DataError(f"{path} must be a readable {path.suffix} file: {reason}") from error
    return table


def column_values(table: pa.Table, column: str, source: str) -> list[Any]:
    """Return the values of a column as Python has them.

    Args:
        table: As read.
        column: Its name, which is there once.
        source: Where the table is from, for messages.

    Raises:
        DataError: If Python has none for what stands there, such as a date of year 9,999,999.
    """
    try:
        values: list[Any] = table[column].to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"column {column!r} of {source} must hold values that Python has, got a "
            f"{table[column].type} ({reason}): write them as texts or numbers."
        ) from error
    return values


_CSV = pyarrow.csv.ParseOptions(newlines_in_values=True)


def _block_size(path: Path) -> int:
    """Return what lets pyarrow read a file as one block, if it can: no row may be longer."""
    return min(max(path.stat().st_size, 2**20), 2**31 - 1)


def read_csv(path: Path, texts: Sequence[str]) -> pa.Table:
    """Read a CSV file whose empty cells are missing.

    Args:
        path: The file.
        texts: Columns that hold texts, some of which may look like numbers.
    """
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=_block_size(path)),
        parse_options=_CSV,
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(texts, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def read_csv_as_written(path: Path, texts: Sequence[str]) -> pa.Table:
    """Read a CSV file so that its cells can be written again as they stand there.

    A column is of numbers only where each stands as its number is written: 00123 is a text.

    Args:
        path: The file.
        texts: Columns that hold texts, whatever they look like.
    """
    whole = pyarrow.csv.ReadOptions(block_size=_block_size(path))
    with pyarrow.csv.open_csv(path, read_options=whole, parse_options=_CSV) as head:
        names = head.schema.names
    table = read_csv(path, names)
    columns = [
        column if name in texts else _numbers_if_exact(column)
        for name, column in zip(names, table.columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, names)


def _numbers_if_exact(column: pa.ChunkedArray) -> pa.ChunkedArray:
    for kind in (pa.int64(), pa.float64()):
        try:
            numbers = column.cast(kind)
        except pa.ArrowInvalid:
            continue
        if numbers.cast(pa.string()).equals(column) and pc.all(pc.is_finite(numbers)).as_py():
            return numbers
    return column


def read_json_lines(path: Path, _: Sequence[str]) -> pa.Table:
    """Read a file of JSON lines, which has texts, and no dates: pyarrow makes some of texts."""
    whole = pyarrow.json.ReadOptions(block_size=_block_size(path))
    table = pyarrow.json.read_json(path, read_options=whole)
    schema = pa.schema([field.with_type(_without_times(field.type)) for field in table.schema])
    if schema == table.schema:
        return table
    parsed = pyarrow.json.ParseOptions(explicit_schema=schema)
    return pyarrow.json.read_json(path, read_options=whole, parse_options=parsed)


def _without_times(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    return kind


TABLES: Mapping[str, Reader] = {
    ".parquet": lambda path, _: pyarrow.parquet.read_table(path),
    ".csv": read_csv,
    ".jsonl": read_json_lines,
}
"""By a file's ending, what reads it."""
AS_WRITTEN: Mapping[str, Reader] = {**TABLES, ".csv": read_csv_as_written}
"""The same, so that every cell can be handed on as it was."""
