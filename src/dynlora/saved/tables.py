"""Files of rows to tables: one reader a format, for all that reads rows from a disk."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from dynlora.errors import DataError
from dynlora.files.plain_values import DEEPEST

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


def shown_names(names: Sequence[str]) -> str:
    """Return the names of columns for a message: the beginning of long ones and of many."""
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    cut = (name if len(name) <= 60 else f"{name[:57]}..." for name in names[:_SHOWN])
    return ", ".join(cut) + more


_SHOWN = 50
"""Columns that a message lists before it only counts."""
MOST_COLUMNS = 100_000
"""Columns of a CSV file and keys of a JSON line at most."""
_CSV = pyarrow.csv.ParseOptions(newlines_in_values=True)


def _block_size(path: Path) -> int:
    """Return what lets pyarrow read a file as one block, if it can: no row may be longer."""
    return min(max(path.stat().st_size, 2**20), 2**31 - 1)


def _refuse_wide(columns: int) -> None:
    """Refuse a table that pyarrow would read for minutes, since each column costs 50 µs.

    Raises:
        pyarrow.ArrowInvalid: If it has too many columns.
    """
    if columns > MOST_COLUMNS:
        raise pa.ArrowInvalid(f"it has {columns} columns, and {MOST_COLUMNS} are the most")


def _check_width(path: Path) -> None:
    """Check how many columns a CSV file has by the commas in its first line.

    Raises:
        pyarrow.ArrowInvalid: If they are too many.
    """
    with path.open(encoding="latin-1") as file:
        _refuse_wide(file.readline().count(",") + 1)


def read_csv(path: Path, texts: Sequence[str]) -> pa.Table:
    """Read a CSV file whose empty cells are missing.

    Args:
        path: The file.
        texts: Columns that hold texts, some of which may look like numbers.
    """
    _check_width(path)
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
    _check_width(path)
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
    _check_structure(path.read_bytes())
    whole = pyarrow.json.ReadOptions(block_size=_block_size(path))
    table = pyarrow.json.read_json(path, read_options=whole)
    schema = pa.schema([field.with_type(without_times(field.type)) for field in table.schema])
    if schema == table.schema:
        return table
    parsed = pyarrow.json.ParseOptions(explicit_schema=schema)
    return pyarrow.json.read_json(path, read_options=whole, parse_options=parsed)


_OUTSIDE = bytes(set(range(256)) - set(b'[]{}:"'))


def _check_structure(content: bytes) -> None:
    """Check how deeply JSON nests, since pyarrow crashes on deep values, and how many keys it has.

    Raises:
        pyarrow.ArrowInvalid: If a value nests too deeply, or an object has too many keys.
    """
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    bare = re.sub(rb'"[^"]*"', b"", unescaped.translate(None, _OUTSIDE))
    marks = np.frombuffer(bare, np.uint8)
    opens = (marks == ord("[")) | (marks == ord("{"))
    closes = (marks == ord("]")) | (marks == ord("}"))
    levels = np.cumsum(opens.astype(np.int64) - closes)
    if levels.max(initial=0) > DEEPEST:
        raise pa.ArrowInvalid(f"it nests deeper than {DEEPEST} levels")
    rows = np.cumsum(opens & (levels == 1))
    keys = rows[(marks == ord(":")) & (levels == 1)]
    _refuse_wide(int(np.bincount(keys).max(initial=0)))


def without_times(kind: pa.DataType) -> pa.DataType:
    """Return a type in which texts take the place of dates and times."""
    if pa.types.is_temporal(kind):
        return pa.string()
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(is_kind(kind) for is_kind in lists):
        return pa.list_(without_times(kind.value_type))
    if pa.types.is_map(kind):
        return pa.map_(without_times(kind.key_type), without_times(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(without_times(field.type)) for field in kind])
    return kind


TABLES: Mapping[str, Reader] = {
    ".parquet": lambda path, _: pyarrow.parquet.read_table(path),
    ".csv": read_csv,
    ".jsonl": read_json_lines,
}
"""By a file's ending, what reads it."""
AS_WRITTEN: Mapping[str, Reader] = {**TABLES, ".csv": read_csv_as_written}
"""The same, so that every cell can be handed on as it was."""
