"""Type checks of plain values: a file's content in, an error naming the first wrong value out."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

Kind = Any
"""A type hint such as `int`, `list[int]`, `dict[str, float]`, `X | None` or `Any`; a mapping from
required keys to kinds, which allows other keys; or a dataclass, whose fields are the only keys."""
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def check_kind(value: object, kind: Kind, name: str = "its content") -> None:
    """Check that a value from a file is of a kind.

    Args:
        value: The value.
        kind: The required kind.
        name: The value's name in the message.

    Raises:
        ValueError: If the value or a nested value is of another kind, missing, or unknown.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        if unknown := sorted(map(str, _keys(value) - hints.keys())):
            raise ValueError(f"{name} must hold {', '.join(hints)} only, got `{unknown[0][:60]}`")
        required = {field.name for field in fields(kind) if field.default is MISSING}
        kind = {key: hints[key] for key in hints if key in required or key in _keys(value)}
    if isinstance(kind, Mapping):
        _check_type(value, dict, name)
        for key, inner in kind.items():
            if key not in _keys(value):
                raise ValueError(f"{name} must hold `{key}`, got none")
            check_kind(value[key], inner, f"`{key}` of {name}")  # type: ignore[index]
        return
    origin: Any = get_origin(kind)
    inside = get_args(kind)
    if origin is UnionType:
        if value is not None or NoneType not in inside:
            check_kind(value, inside[0], name)
    elif origin is list:
        for item in _check_type(value, list, name):
            check_kind(item, inside[0], f"a value in {name}")
    elif origin in (dict, Mapping):
        for key, item in _check_type(value, dict, name).items():
            check_kind(item, inside[1], f"`{key}` of {name}")
    elif kind is not Any:
        _check_type(value, kind, name)


def _keys(value: object) -> set[object]:
    return set(value) if isinstance(value, dict) else set()


def _check_type(value: Any, kind: type, name: str) -> Any:
    """Return the value if it has the type; an `int` counts as a `float`, a `bool` as no number.

    Raises:
        ValueError: If it has another type.
    """
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ValueError(f"{name} must be {_WORDS[kind]}, got {str(value)[:60]!r}")
