"""JSON and YAML files: plain values in standard form, or one kind of error for anything else."""

import time
from pathlib import Path

import pytest

from dynlora.files.json_files import append_line, read_lines, write_lines
from dynlora.files.plain_values import DEEPEST, LARGEST, parse_json, parse_yaml

NAN, INFINITY = float("nan"), float("inf")
NINE = ", ".join(["*{0}"] * 9)


def test_lines_are_read_back_as_standard_json_except_one_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for _ in range(2):
        assert read_lines(path)[:2] == ([], False)
        write_lines(path, [])
    write_lines(path, [{"step": 1, "loss": NAN, "both": (-INFINITY, 1.5)}])
    append_line(path, {"step": 2, "inner": [{"loss": INFINITY}], "text": "a\nb \u2028 nan"})
    kept = [
        {"step": 1, "loss": None, "both": [None, 1.5]},
        {"step": 2, "inner": [{"loss": None}], "text": "a\nb \u2028 nan"},
    ]
    assert read_lines(path)[:2] == (kept, False)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_lines(path)[:2] == (kept, True)


def bomb(first: str, repeat: str) -> str:
    """Return a text of some lines whose aliases stand for 9 ** 9 values."""
    levels = [f"a0: &a0 {first}"]
    levels += [f"a{n}: &a{n} {repeat.replace('LAST', f'a{n - 1}')}" for n in range(1, 10)]
    return "\n".join(levels)


def nested(levels: int) -> str:
    return "[" * levels + "1" + "]" * levels


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_values_within_bounds_are_read_and_others_are_one_kind_of_error(parse) -> None:
    values = {"a": [1, -1.5, True, None, "x", LARGEST, -LARGEST], "b": {}}
    assert parse(f'{{"a": [1, -1.5, true, null, "x", {LARGEST}, -{LARGEST}], "b": {{}}}}') == values
    assert parse(nested(DEEPEST))
    for text, told in (
        (nested(DEEPEST + 1), "nests deeper than 64 levels"),
        (nested(100_000), "nests deeper than 64 levels"),
        ('{"a": ' * 100_000, "nests deeper than 64 levels"),
        (f'{{"a": [-{LARGEST + 1}]}}', "whole number beyond 9223372036854775807"),
        ("9" * 5000, "4300 digits"),
        ("{", "Expecting property|expected the node"),
        ('"\x00"', "control character|special characters"),
    ):
        started = time.process_time()
        with pytest.raises(ValueError, match=told):
            parse(text)
        assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (bomb("[x, x]", f"[{NINE.format('LAST')}]"), "aliases stand for more than 100000 values"),
        (bomb("{x: 1}", f"{{<<: [{NINE.format('LAST')}]}}"), "more than 100000 values"),
        ("a: &a {b: *a, c: *a}", "nests deeper than 64 levels"),
        ("a: !!python/object/apply:os.system [exit]", "could not determine a constructor"),
        ("a: !!timestamp never", "could not determine a constructor"),
        ("a: !!bool maybe", "maybe"),
        ("a: !!int ''", "index out of range"),
        ("{? [1] : 2}", "unhashable key"),
        ("a: 0x" + "f" * 5000, "whole number beyond"),
        ("a: *b", "undefined alias"),
        ('a: "\\ud800"', "surrogates not allowed"),
        ("--- 1\n--- 2", "single document"),
        ("a: {b: 1}\nc: 2\na: {d: 3}\n", "the key 'a' stands twice, in lines 1 and 3"),
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
