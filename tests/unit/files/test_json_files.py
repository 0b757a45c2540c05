"""JSON that every reader takes, and lines of which the last may be half written."""

import json
import re
from pathlib import Path

import pytest

from dynlora.errors import RunFileError
from dynlora.files.json_files import (
    append_line,
    finite,
    read_json,
    read_lines,
    to_json,
    write_json,
    write_lines,
)

NAN, INFINITY = float("nan"), float("inf")


def test_numbers_that_are_not_finite_become_null_wherever_they_stand() -> None:
    given = {"a": NAN, "b": [INFINITY, 1.5, {"c": -INFINITY}], "d": (NAN, 2), "e": "nan", "f": True}
    expected = {"a": None, "b": [None, 1.5, {"c": None}], "d": [None, 2], "e": "nan", "f": True}
    assert finite(given) == expected
    assert json.loads(to_json(given), parse_constant=pytest.fail) == expected


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["values.json"]
    assert read_json(path) == {"a": 1}


def test_lines_come_back_and_one_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == ([], False)
    write_lines(path, [])
    assert read_lines(path) == ([], False)
    write_lines(path, [{"step": 1, "loss": NAN}])
    append_line(path, {"step": 2, "loss": INFINITY, "text": "a\nb \u2028 c"})
    kept = [{"step": 1, "loss": None}, {"step": 2, "loss": None, "text": "a\nb \u2028 c"}]
    assert read_lines(path) == (kept, False)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_lines(path) == (kept, True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "got 0 characters that are not"),
        ('{"a": 1', "got 7 characters"),
        ("[1]", "not an object but list"),
    ],
)
def test_a_file_that_is_not_one_object_is_named(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFileError, match=rf"run\.json must be one whole JSON object.*{told}"):
        read_json(tmp_path / "run.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    told = f"readable run.json, got [Errno 2] No such file or directory: '{tmp_path / 'run.json'}'"
    with pytest.raises(RunFileError, match=re.escape(told)):
        read_json(tmp_path / "run.json")


@pytest.mark.parametrize("line", ["half", "[1]", ""])
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(RunFileError, match=r"each line of .*metrics\.jsonl .* in line 2: remove"):
        read_lines(path)
