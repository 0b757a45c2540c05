"""JSON and YAML files: plain values in standard form, or one kind of error for anything else."""

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from dynlora.files.kinds import check_kind
from dynlora.files.plain_values import DEEPEST, LARGEST, parse_json, parse_yaml

NAN, INFINITY = float("nan"), float("inf")
NINE = ", ".join(["*{0}"] * 9)


def test_numbers_that_are_not_finite_are_written_as_null() -> None:
    given = {"a": NAN, "b": [INFINITY, 1.5, {"c": -INFINITY}], "d": (NAN, 2), "e": "nan", "f": True}
    expected = {"a": None, "b": [None, 1.5, {"c": None}], "d": [None, 2], "e": "nan", "f": True}
    assert finite(given) == expected
    assert json.loads(to_json(given), parse_constant=pytest.fail) == expected


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["values.json"]
    assert read_json(path) == {"a": 1}


def test_lines_are_read_back_except_one_that_was_cut_short(tmp_path: Path) -> None:
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


def test_a_file_that_is_missing_or_not_one_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(RunFileError, match=re.escape(f"No such file or directory: '{path}'")):
        read_json(path)
    for content, told in (("", "got 0 characters"), ('{"a": 1', "got 7 char"), ("[1]", "but list")):
        path.write_text(content)
        with pytest.raises(RunFileError, match=rf"run\.json must be one whole JSON object.*{told}"):
            read_json(path)
    for line in ("half", "[1]", ""):
        path.write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(RunFileError, match=r"each line of .*run\.json .* in line 2: remove"):
            read_lines(path)


def bomb(first: str, repeat: str) -> str:
    """Return a text of some lines whose aliases stand for 9 ** 9 values."""
    levels = [f"a0: &a0 {first}"]
    levels += [f"a{n}: &a{n} {repeat.replace('LAST', f'a{n - 1}')}" for n in range(1, 10)]
    return "\n".join(levels)


def nested(levels: int) -> str:
    return "[" * levels + "1" + "]" * levels


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_values_within_bounds_are_read_and_others_are_one_kind_of_error(parse) -> None:
    assert parse('{"a": [1, -1.5, true, null, "x"], "b": {}}') == {
        "a": [1, -1.5, True, None, "x"], "b": {},
    }  # fmt: skip
    assert parse(nested(DEEPEST))
    assert parse(f"[{LARGEST}, -{LARGEST}]") == [LARGEST, -LARGEST]
    for text, told in (
        (nested(DEEPEST + 1), "nests deeper than 64 levels"),
        (nested(500), "nests deeper than 64 levels"),
        (nested(100_000), "nests deeper than 64 levels"),
        ('{"a": ' * 100_000, "nests deeper than 64 levels"),
        (str(LARGEST + 1), "whole number beyond 9223372036854775807"),
        (f'{{"a": [-{LARGEST + 1}]}}', "whole number beyond"),
        ("9" * 5000, "4300 digits"),
        ("{", "Expecting property|expected the node"),
        ('"\x00"', "control character|special characters"),
    ):
        started = time.process_time()
        with pytest.raises(ValueError, match=told):
            parse(text)
        assert time.process_time() - started < 1


def test_pythons_own_names_of_numbers_are_read_from_json() -> None:
    assert math.isnan(parse_json('{"loss": NaN}')["loss"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (bomb("[x, x]", f"[{NINE.format('LAST')}]"), "aliases stand for more than 100000 values"),
        (
            bomb("{x: 1}", "{" + ", ".join(f"k{n}: *LAST" for n in range(9)) + "}"),
            "aliases stand for more than 100000 values",
        ),
        (
            bomb("{x: 1}", f"{{<<: [{NINE.format('LAST')}]}}"),
            "aliases stand for more than 100000 values",
        ),
        ("a: &a [*a]", "nests deeper than 64 levels"),
        ("a: &a {b: *a, c: *a}", "nests deeper than 64 levels"),
        ("a: !!python/object/apply:os.system [exit]", "could not determine a constructor"),
        ("a: !!binary x", "could not determine a constructor"),
        ("a: !!timestamp never", "could not determine a constructor"),
        ("a: !!set {x}", "could not determine a constructor"),
        ("a: !!bool maybe", "maybe"),
        ("a: !!int ''", "index out of range"),
        ("a: !!float x", "could not convert"),
        ("{? [1] : 2}", "unhashable key"),
        ("a: 0x" + "f" * 5000, "whole number beyond"),
        ("a: *b", "undefined alias"),
        ('a: "\\ud800"', "surrogates not allowed"),
        ("--- 1\n--- 2", "single document"),
        ("a: {b: 1}\nc: 2\na: {d: 3}\n", "the key 'a' stands twice, in lines 1 and 3"),
        ("a: {b: 1, b: 2}", "lines 1 and 1"),
    ],
    ids=lambda value: value[:30],
)
def test_yaml_with_more_than_plain_values_is_refused(text: str, told: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=told):
        parse_yaml(text)
    assert time.process_time() - started < 1


def test_yaml_has_jsons_types_with_aliases_resolved_and_dates_as_texts() -> None:
    text = "base: &base {r: 8, when: 2001-01-01}\none: {<<: *base, r: 4}\nboth: [*base, *base]\n"
    base = {"r": 8, "when": "2001-01-01"}
    assert parse_yaml(text) == {"base": base, "one": base | {"r": 4}, "both": [base, base]}
    assert parse_yaml("") is None
    assert parse_yaml("a: 1\n'1': 2\n1: 3\n") == {"a": 1, "1": 2, 1: 3}


@dataclass
class Point:
    x: int
    y: float | None
    label: str = ""


KIND = {
    "count": int,
    "on": bool,
    "points": list[Point],
    "by_name": Mapping[str, float],
    "rest": dict[str, Any],
    "names": list[list[str]] | None,
}
GOOD: dict[str, Any] = {
    "count": 1,
    "on": True,
    "points": [{"x": 1, "y": None}, {"x": 2, "y": 2, "label": "two"}],
    "by_name": {"a": 1, "b": float("inf")},
    "rest": {"a": [None]},
    "names": None,
    "unknown": object(),
}


def test_values_of_the_required_kinds_pass() -> None:
    check_kind(GOOD, KIND)
    check_kind(GOOD | {"names": [["a"], []]}, KIND)
    with pytest.raises(ValueError, match="the file must be an object, got 'None'"):
        check_kind(None, KIND, "the file")
    with pytest.raises(ValueError, match="the file must hold `count`, got none"):
        check_kind({}, KIND, "the file")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"count": True}, "`count` of the file must be a whole number, got 'True'"),
        ({"count": 1.0}, "`count` of the file must be a whole number, got '1.0'"),
        ({"on": 1}, "`on` of the file must be true or false, got '1'"),
        ({"points": {}}, "`points` of the file must be a list, got '{}'"),
        ({"points": [{"x": 1}]}, "must hold `y`, got none"),
        ({"points": [{"x": 1, "y": "2"}]}, "`y` of a value in `points` .* a number, got '2'"),
        ({"points": [{"x": 1, "y": 2, "label": 3}]}, "`label` of .* must be a text, got '3'"),
        ({"points": [{"x": 1, "y": 2, "z": 3}]}, "must hold x, y, label only, got `z`"),
        ({"by_name": {"a": False}}, "`a` of `by_name` of the file must be a number, got 'False'"),
        ({"rest": []}, "`rest` of the file must be an object"),
        ({"names": ["a"]}, "a value in `names` of the file must be a list, got 'a'"),
    ],
)
def test_a_value_of_another_kind_is_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_kind(GOOD | changed, KIND, "the file")
