"""Tables from files of any origin: whole, or refused by the file's name."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dynlora.errors import DataError
from dynlora.saved.tables import TABLES, column_values, read_table

NO_UTF8 = b"\xff\xfe"


def no_text(count: int) -> pa.Array:
    offsets = pa.array([2 * n for n in range(count + 1)], pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(count, offsets, pa.py_buffer(NO_UTF8 * count))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b"text\n" + NO_UTF8 + b"\n"),
        ("rows.csv", NO_UTF8 + b"\nred\n"),
        ("rows.jsonl", b'{"text": "' + NO_UTF8 + b'"}\n'),
        ("rows.jsonl", b'{"' + NO_UTF8 + b'": "red"}\n'),
    ],
)
def test_texts_that_are_not_utf8_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} must be a readable {Path(name).suffix} file"):
        read_table(tmp_path / name, ["text"])


def test_parquet_with_texts_that_are_not_utf8_is_refused(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": no_text(3)}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet must be a readable .*Invalid UTF8"):
        read_table(tmp_path / "rows.parquet", [])


@pytest.mark.parametrize("ending", TABLES)
def test_an_empty_file_has_no_row(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    path.touch()
    with pytest.raises(DataError, match=rf"at least 1 row, got 0 in .*rows{ending}"):
        read_table(path, [])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (pa.array([2**31 - 1], pa.date32()), r"date32.*magnitude"),
        (pa.array([2**62], pa.timestamp("us")), r"timestamp"),
        (pa.StructArray.from_arrays([pa.array([1])] * 2, names=["a", "a"]), "duplicate field"),
    ],
    ids=str,
)
def test_values_that_python_does_not_have_are_refused(values: pa.Array, told: str) -> None:
    with pytest.raises(DataError, match=f"column 'when' of rows.parquet must hold .*{told}"):
        column_values(pa.table({"when": values}), "when", "rows.parquet")
