"""Kinds of values from files: each wrong one is told by its name, and all others pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from dynlora.files.kinds import check_kind


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


def test_values_of_their_kinds_pass() -> None:
    check_kind(GOOD, KIND)
    check_kind(GOOD | {"names": [["a"], []]}, KIND)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"count": True}, "`count` of the file must be a whole number, got 'True'"),
        ({"count": 1.0}, "`count` of the file must be a whole number, got '1.0'"),
        ({"count": None}, "`count` of the file must be a whole number, got 'None'"),
        ({"on": 1}, "`on` of the file must be true or false, got '1'"),
        ({"points": {}}, "`points` of the file must be a list, got '{}'"),
        ({"points": [{"x": 1}]}, "must hold `y`, got none"),
        ({"points": [{"x": 1, "y": "2"}]}, "`y` of a value in `points` .* a number, got '2'"),
        ({"points": [{"x": 1, "y": 2, "label": 3}]}, "`label` of .* must be a text, got '3'"),
        ({"points": [{"x": 1, "y": 2, "z": 3}]}, "must hold x, y, label only, got `z`"),
        ({"points": [[1, 2]]}, "a value in `points` of the file must be an object"),
        ({"by_name": {"a": False}}, "`a` of `by_name` of the file must be a number, got 'False'"),
        ({"rest": []}, "`rest` of the file must be an object"),
        ({"names": ["a"]}, "a value in `names` of the file must be a list, got 'a'"),
    ],
)
def test_a_value_of_another_kind_is_told_by_its_name(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_kind(GOOD | changed, KIND, "the file")
    with pytest.raises(ValueError, match="the file must be an object, got 'None'"):
        check_kind(None, KIND, "the file")
    with pytest.raises(ValueError, match="the file must hold `count`, got none"):
        check_kind({}, KIND, "the file")
