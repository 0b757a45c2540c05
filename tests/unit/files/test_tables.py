"""Tables from files of any origin: whole, or refused by the file's name."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dynlora.errors import DataError
from dynlora.files.tables import AS_WRITTEN, TABLES, read_table
from tests.jobs import write_rows

NO_UTF8 = b"\xff\xfe"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b"text\n" + NO_UTF8 + b"\n"),
        ("rows.csv", NO_UTF8 + b"\nred\n"),
        ("rows.jsonl", b'{"text": "' + NO_UTF8 + b'"}\n'),
        ("rows.jsonl", b'{"' + NO_UTF8 + b'": "red"}\n'),
        ("rows.json", b'[{"text": "' + NO_UTF8 + b'"}]'),
        ("rows.parquet", None),
    ],
)
def test_texts_that_are_not_utf8_are_refused(
    name: str, content: bytes | None, tmp_path: Path
) -> None:
    if content is None:
        offsets = pa.array([0, 2], pa.int32()).buffers()[1]
        texts = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(NO_UTF8))
        pa.parquet.write_table(pa.table({"text": texts}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} must be a readable {Path(name).suffix} file"):
        read_table(tmp_path / name, ["text"], TABLES)


def test_cells_stay_as_they_were_written_unless_all_of_a_column_are_plain_numbers(
    tmp_path: Path,
) -> None:
    columns = {
        "text": ["5", "6"],
        "id": ["00123", "7"],
        "hex": ["0x1F", "1"],
        "day": ["2024-01-05", "2024-01-06"],
        "price": ["1.50", "2.5"],
        "not_finite": ["nan", "1.5"],
        "count": ["12", ""],
        "score": ["0.25", "-1.5"],
    }
    lines = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    table = read_table(tmp_path / "rows.csv", ["text"], AS_WRITTEN)
    assert table.to_pydict() == columns | {"count": [12, None], "score": [0.25, -1.5]}


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", '[{"text": "x"}]'), ("a.jsonl", '{"text": "x"}'), ("a.csv", "text\nx\n")],
)
def test_a_mark_of_the_byte_order_is_no_content(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_table(tmp_path / name, [], TABLES).to_pylist() == [{"text": "x"}]


def test_texts_of_json_lines_that_look_like_dates_stay_texts(tmp_path: Path) -> None:
    row = {"day": "2024-01-05", "chat": [{"at": "2024-01-05 10:11:12", "n": 1}], "count": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert read_table(tmp_path / "rows.jsonl", [], TABLES).to_pylist() == [row]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_row_of_megabytes_is_a_row(tmp_path: Path, name: str) -> None:
    rows = [{"text": "red", "n": 1}, {"text": "long " * 600_000, "n": 2}]
    write_rows(tmp_path / name, rows)
    for readers in (TABLES, AS_WRITTEN):
        assert read_table(tmp_path / name, ["text"], readers).to_pylist() == rows


def deep(opens: str, closes: str) -> str:
    return f'{{"text": "red", "v": {opens * 100_000}1{closes * 100_000}}}\n'


@pytest.mark.parametrize("nest", [('{"a":[', "]}"), ("[\n", "]")], ids=["deep", "over lines"])
def test_a_file_too_deep_to_be_rows_is_refused_at_once(
    tmp_path: Path, nest: tuple[str, str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(deep(*nest))
    started = time.process_time()
    with pytest.raises(DataError, match=r"rows\.jsonl must be a readable .*: it nests deeper than"):
        read_table(tmp_path / "rows.jsonl", ["text"], TABLES)
    assert time.process_time() - started < 2


def test_brackets_in_texts_are_not_depth_and_old_line_ends_are_read(tmp_path: Path) -> None:
    text = 'a "quoted\\\\" \\" {[:' * 10_000
    rows = [{"text": text, "messages": [{"n": 1}] * 60_000}, {"text": "\\", "messages": []}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_table(tmp_path / "rows.jsonl", ["text"], TABLES).to_pylist() == rows
    (tmp_path / "rows.csv").write_text("text,n\r" + "red,1\r" * 200_000)
    assert read_table(tmp_path / "rows.csv", ["text"], TABLES).num_rows == 200_000
