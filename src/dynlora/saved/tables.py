"""Files of rows to tables: one reader a format, for all that reads rows from a disk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from dynlora.errors import DataError


def read_table(path: Path, texts: Sequence[str]) -> pa.Table:
    """Read a file, whose ending is one of `TABLES`, to its last byte.

    Args:
        path: The file.
        texts: Columns that hold texts, some of which may look like numbers.

    Raises:
        DataError: If it is unreadable, or empty.
    """
    try:
        table = TABLES[path.suffix](path, texts)
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


def read_csv(path: Path, texts: Sequence[str]) -> pa.Table:
    """Read a CSV file whose empty cells are missing.

    Args:
        path: The file.
        texts: Columns that hold texts, some of which may look like numbers.
    """
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(texts, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


TABLES: Mapping[str, Callable[[Path, Sequence[str]], pa.Table]] = {
    ".parquet": lambda path, _: pyarrow.parquet.read_table(path),
    ".csv": read_csv,
    ".jsonl": lambda path, _: pyarrow.json.read_json(path),
}
"""By a file's ending, what reads it, given its columns of texts."""
