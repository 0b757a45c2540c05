"""Rows as CSV, JSON Lines and Parquet: good files, and others like them."""

import io
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from hypothesis import strategies as st

from tests.fuzz.mutations import LONG, Draw, mutated_bytes, mutated_lines

ROWS: list[dict[str, Any]] = [
    {"text": f"round {n}, “red”", "label": n % 3, "score": n / 4, "words": ["big", "cat"],
     "tags": [0, 1], "vector": [0.5, -1.0]}
    for n in range(12)
]  # fmt: skip
PLAIN = {"text": "read_texts", "label": "read_classes", "score": "read_numbers"}
READERS = PLAIN | {"words": "read_words", "tags": "read_class_lists", "vector": "read_vectors"}
"""By column, what reads it."""


def in_bytes(write: Callable[[pa.Table, Any], None], table: pa.Table) -> bytes:
    sink = io.BytesIO()
    write(table, sink)
    return sink.getvalue()


def parquet(table: pa.Table, compression: str = "snappy") -> bytes:
    return in_bytes(
        lambda made, sink: pyarrow.parquet.write_table(made, sink, compression=compression), table
    )


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = pa.Table.from_pylist(ROWS)
CSV = in_bytes(pyarrow.csv.write_csv, TABLE.select([*PLAIN]))
MARKUP = (
    b'"', b'""', b",", b"\n", b"\r", b"\x00", b"\xff", b"\xef\xbb\xbf", b"9" * 400, b"nan",
    b"1e999", b"-0", b"2001-01-01", b"true", b"," * 1000, b"\n" * 1000, b"x" * LONG,
)  # fmt: skip
"""What means something in CSV, or could be taken for another type."""


@st.composite
def csv_files(draw: Draw) -> bytes:
    """CSV with pieces of markup in places where they mean something else."""
    content = bytearray(CSV)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        content[place : place + draw(st.integers(0, 3))] = draw(st.sampled_from(MARKUP))
    return bytes(content)


def _wrong_utf8(count: int) -> pa.Array:
    offsets = pa.array([2 * n for n in range(count + 1)], pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(count, offsets, pa.py_buffer(b"\xff\xfe" * count))


def _nested(count: int) -> pa.Array:
    made = pa.array([1] * count)
    for _ in range(50):
        made = pa.ListArray.from_arrays(list(range(count + 1)), made)
    return made


ODD_COLUMNS: tuple[Callable[[int], pa.Array], ...] = (
    pa.nulls,
    *(
        lambda n, values=values, kind=kind: pa.array((values * n)[:n], kind)
        for values, kind in (
            ([None], pa.string()), ([""], None), ([b"\xff"], None), (["x"], pa.large_string()),
            ([0, 1], pa.uint8()), ([0.0, 1.0], pa.float16()), ([2**64 - 1], pa.uint64()),
            ([-(2**63)], None), ([float("nan"), float("inf")], None), ([True, None], None),
            ([Decimal("1.5")], None), ([Decimal(10) ** 70], pa.decimal256(76)),
            ([1], pa.timestamp("ns")), ([2**62], pa.timestamp("ms")),
            ([-(2**62)], pa.timestamp("us", "UTC")), ([1], pa.timestamp("us", "Nowhere/Land")),
            ([2**31 - 1], pa.date32()), ([1], pa.time64("ns")), ([2**62], pa.duration("s")),
            ([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())),
            ([{"a": [None, {"b": b"x"}]}], None), ([[]], pa.list_(pa.int64())),
            ([[None]], pa.list_(pa.string())), ([["x", ""]], None), ([[1.5, float("nan")]], None),
            ([[1, 2]], pa.list_(pa.int64(), 2)), ([[2**63 - 1]], None),
        )
    ),
    lambda n: pa.array(["x"] * n).dictionary_encode(),
    lambda n: pa.StructArray.from_arrays([pa.array([1] * n)] * 2, names=["a", "a"]),
    _wrong_utf8,
    _nested,
)  # fmt: skip
"""Columns of types that are no text, no class and no number, or only look like one."""


@st.composite
def parquet_tables(draw: Draw) -> bytes:
    """Sound Parquet with columns that are missing, there twice, or of another type."""
    rows = draw(st.sampled_from([12, 12, 12, 0, 2]))
    columns = {name: TABLE[name].slice(0, rows).combine_chunks() for name in READERS}
    for _ in range(draw(st.integers(1, 3))):
        columns[draw(st.sampled_from([*READERS]))] = draw(st.sampled_from(ODD_COLUMNS))(rows)
    names = list(columns)
    if draw(st.booleans()):
        names[draw(st.integers(0, len(names) - 1))] = draw(st.sampled_from(["text", "", "x" * 999]))
    return parquet(pa.Table.from_arrays(list(columns.values()), names=names))


FILES = {
    "rows.csv": (CSV, st.one_of(csv_files(), mutated_bytes(CSV)), PLAIN),
    "rows.jsonl": (JSONL, mutated_lines(ROWS), READERS),
    "rows.parquet": (
        parquet(TABLE),
        st.one_of(
            parquet_tables(), *(mutated_bytes(parquet(TABLE, how)) for how in ("none", "zstd"))
        ),
        READERS,
    ),
}
"""By name, a file that is sound, files like it, and what reads its columns."""
