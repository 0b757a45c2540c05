"""JSON and YAML of others: plain values, or one kind of error whatever the text holds."""

import math
import time

import pytest

from dynlora.files.plain_values import DEEPEST, LARGEST, parse_json, parse_yaml

PARSERS = pytest.mark.parametrize("parse", [parse_json, parse_yaml])
NINE = ", ".join(["*{0}"] * 9)


def bomb(first: str, repeat: str) -> str:
    """Return a text of some lines whose aliases stand for 9 ** 9 values."""
    levels = [f"a0: &a0 {first}"]
    levels += [f"a{n}: &a{n} {repeat.replace('LAST', f'a{n - 1}')}" for n in range(1, 10)]
    return "\n".join(levels)


def nested(levels: int) -> str:
    return "[" * levels + "1" + "]" * levels


@PARSERS
def test_what_a_program_writes_comes_back(parse) -> None:
    assert parse('{"a": [1, -1.5, true, null, "x"], "b": {}}') == {
        "a": [1, -1.5, True, None, "x"], "b": {},
    }  # fmt: skip
    assert parse(nested(DEEPEST))
    assert parse(f"[{LARGEST}, -{LARGEST}]") == [LARGEST, -LARGEST]


def test_numbers_that_json_does_not_have_are_read_as_python_writes_them() -> None:
    assert math.isnan(parse_json('{"loss": NaN}')["loss"])


@PARSERS
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (nested(DEEPEST + 1), "nests deeper than 64 levels"),
        (nested(500), "nests deeper than 64 levels"),
        (nested(100_000), "nests deeper than 64 levels"),
        ('{"a": ' * 100_000, "nests deeper than 64 levels"),
        (str(LARGEST + 1), "whole number beyond 9223372036854775807"),
        (f'{{"a": [-{LARGEST + 1}]}}', "whole number beyond"),
        ("9" * 5000, "4300 digits"),
        ("{", "Expecting property|expected the node"),
        ('"\x00"', "control character|special characters"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_out_of_bounds_is_one_kind_of_error(parse, text: str, told: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=told):
        parse(text)
    assert time.process_time() - started < 1


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
        ("a: !!int x", "invalid literal"),
        ("a: !!float x", "could not convert"),
        ("{? [1] : 2}", "unhashable key"),
        ("a: 0x" + "f" * 5000, "whole number beyond"),
        ("a: *b", "undefined alias"),
        ('a: "\\ud800"', "surrogates not allowed"),
        ("--- 1\n--- 2", "single document"),
    ],
    ids=lambda value: value[:30],
)
def test_yaml_that_is_more_than_plain_values_is_refused(text: str, told: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=told):
        parse_yaml(text)
    assert time.process_time() - started < 1


def test_yaml_with_aliases_and_dates_is_read_as_json_would_have_it() -> None:
    text = "base: &base {r: 8, when: 2001-01-01}\none: {<<: *base, r: 4}\nboth: [*base, *base]\n"
    base = {"r": 8, "when": "2001-01-01"}
    assert parse_yaml(text) == {"base": base, "one": base | {"r": 4}, "both": [base, base]}
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "lines"),
    [("a: {b: 1}\nc: 2\na: {d: 3}\n", "lines 1 and 3"), ("a: {b: 1, b: 2}", "lines 1 and 1")],
)
def test_a_key_that_stands_twice_is_told_instead_of_lost(text: str, lines: str) -> None:
    with pytest.raises(ValueError, match=f"stands twice, in {lines}: leave one of them out"):
        parse_yaml(text)
    assert parse_yaml("a: 1\n'1': 2\n1: 3\n") == {"a": 1, "1": 2, 1: 3}
