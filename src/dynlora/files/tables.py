"""Read files of rows (Parquet, CSV, JSON Lines, JSON) as tables."""

import io
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from dynlora.errors import DataError
from dynlora.files.plain_values import DEEPEST

Reader = Callable[[Path, Sequence[str]], pa.Table]
"""Reads a file; the second argument names text columns, whose values may look like numbers."""

LARGE = 2**28  # bytes of a file or table above which rows are kept on disk
BLOCK = 2**26  # bytes of a large file that are read at a time
ROWS = 2_000  # rows that are processed at a time


def read_table(path: Path, texts: Sequence[str], readers: Mapping[str, Reader]) -> pa.Table:
    """Read and check a whole file; `readers` are `TABLES`, or `AS_WRITTEN` to write cells again."""
    try:
        table = readers[path.suffix](path, texts)
        # pyarrow reads texts and column names without validating them.
        table.validate(full=True)
        table.column_names  # noqa: B018  decodes them
    except (pa.ArrowException, OSError, ValueError) as error:
        if path.stat().st_size == 0:
            raise DataError(f"a split must hold at least 1 row, got 0 in {path}.") from error
        fault = " ".join(str(error).split())
        raise DataError(f"{path} must be a readable {path.suffix} file: {fault}") from error
    return table


def on_disk(tables: Iterable[pa.Table]) -> pa.Table:
    """Return the rows of all tables, mapped into memory from temporary files.

    Columns that a table lacks are null there, and types widen, such as whole numbers to floats.
    """
    parts = []
    with TemporaryDirectory(prefix="dynlora-", ignore_cleanup_errors=True) as folder:
        for number, table in enumerate(tables):
            path = str(Path(folder, str(number)))
            with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as stream:
                stream.write_table(table)
            # A mapping outlives the name of its file.
            parts.append(pa.ipc.open_file(pa.memory_map(path)).read_all())
    return pa.concat_tables(parts, promote_options="permissive")


def take_rows(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Return rows of a table by their rising numbers; those of a large table stay on disk."""
    numbers = np.asarray(rows, np.int64)
    if table.nbytes <= LARGE or not len(rows):
        return table.take(pa.array(numbers))
    starts = range(0, table.num_rows, ROWS)
    ends = np.searchsorted(numbers, [*starts, table.num_rows]).tolist()
    return on_disk(
        table.slice(start, ROWS).take(pa.array(numbers[low:high] - start))
        for start, low, high in zip(starts, ends, ends[1:], strict=False)
        if low < high
    )


def shown_names(names: Sequence[str]) -> str:
    """Format column names for a message, shortening long names and long lists."""
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    cut = (name if len(name) <= 60 else f"{name[:57]}..." for name in names[:_SHOWN])
    return ", ".join(cut) + more


_SHOWN = 50  # maximum number of columns listed in a message
_CSV = pyarrow.csv.ParseOptions(newlines_in_values=True)


def _block_size(size: int) -> int:
    """Return a block size for a whole file of `size` bytes, because a row must fit into a block."""
    return min(max(size, 2**20), 2**31 - 1)


def _is_large(path: Path) -> bool:
    return path.stat().st_size > LARGE


def _read_parquet(path: Path, _: Sequence[str]) -> pa.Table:
    if not _is_large(path):
        return pyarrow.parquet.read_table(path)
    with pyarrow.parquet.ParquetFile(path) as file:
        return on_disk(pa.Table.from_batches([part]) for part in file.iter_batches(ROWS))


def _read_csv(path: Path, texts: Sequence[str]) -> pa.Table:
    """Read a CSV file; empty cells are missing values.

    The first block of a large file determines the types of its columns.
    """
    large = _is_large(path)
    size = BLOCK if large else _block_size(path.stat().st_size)
    options = {
        "read_options": pyarrow.csv.ReadOptions(block_size=size),
        "parse_options": _CSV,
        "convert_options": pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(texts, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    }
    if not large:
        return pyarrow.csv.read_csv(path, **options)
    with pyarrow.csv.open_csv(path, **options) as parts:
        return on_disk(pa.Table.from_batches([part]) for part in parts)


def _read_csv_as_written(path: Path, texts: Sequence[str]) -> pa.Table:
    """Read a CSV file such that its cells can be written again unchanged.

    A column becomes numeric only if all its cells are canonical numbers: 00123 is a text.
    """
    whole = pyarrow.csv.ReadOptions(block_size=_block_size(path.stat().st_size))
    with pyarrow.csv.open_csv(path, read_options=whole, parse_options=_CSV) as head:
        names = head.schema.names
    table = _read_csv(path, names)
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


def _read_json(path: Path, _: Sequence[str]) -> pa.Table:
    """Read JSON lines, or one list of records, which must fit into memory."""
    with path.open("rb") as file:
        listed = file.read(ROWS).removeprefix(BOM_UTF8).lstrip()[:1] == b"["
        file.seek(0)
        if listed or not _is_large(path):
            return _parse_json(file.read())
        return on_disk(map(_parse_json, _lines(file)))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield blocks of whole lines."""
    while block := file.read(BLOCK):
        yield block + file.readline()


def _parse_json(content: bytes) -> pa.Table:
    """Return the records of JSON; strings that look like dates remain texts."""
    content = content.removeprefix(BOM_UTF8)
    _check_depth(content)
    if content.lstrip()[:1] == b"[":
        content = "\n".join(map(json.dumps, json.loads(content))).encode()
    whole = pyarrow.json.ReadOptions(block_size=_block_size(len(content)))
    table = pyarrow.json.read_json(io.BytesIO(content), read_options=whole)
    schema = pa.schema([field.with_type(without_times(field.type)) for field in table.schema])
    if schema == table.schema:
        return table
    parsed = pyarrow.json.ParseOptions(explicit_schema=schema)
    return pyarrow.json.read_json(io.BytesIO(content), read_options=whole, parse_options=parsed)


_OUTSIDE = bytes(set(range(256)) - set(b'[]{}"'))


def _check_depth(content: bytes) -> None:
    """Check nesting depth, because pyarrow crashes on deep values."""
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    bare = re.sub(rb'"[^"]*"', b"", unescaped.translate(None, _OUTSIDE))
    marks = np.frombuffer(bare, np.uint8)
    opens = (marks == ord("[")) | (marks == ord("{"))
    closes = (marks == ord("]")) | (marks == ord("}"))
    levels = np.cumsum(opens.astype(np.int64) - closes)
    if levels.max(initial=0) > DEEPEST:
        raise pa.ArrowInvalid(f"it nests deeper than {DEEPEST} levels")


def without_times(kind: pa.DataType) -> pa.DataType:
    """Return a type with dates and times replaced by strings."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_map(kind):
        return pa.map_(without_times(kind.key_type), without_times(kind.item_type))
    if isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return pa.list_(without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(without_times(field.type)) for field in kind])
    return kind


TABLES: Mapping[str, Reader] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
}
"""Readers by file ending."""
AS_WRITTEN: Mapping[str, Reader] = {**TABLES, ".csv": _read_csv_as_written}
"""Readers that keep every cell as written."""
