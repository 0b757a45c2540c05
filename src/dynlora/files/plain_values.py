"""Untrusted JSON and YAML: text in, plain values within bounds out.

Parsers accept numbers of thousands of digits, nesting beyond the stack, and YAML aliases that
expand to gigabytes. Here, bad syntax and values out of bounds raise `ValueError`.
"""

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from dynlora.errors import ConfigError

DEEPEST = 64  # most levels of nesting, more than any configuration or record has
LARGEST = 2**63 - 1  # largest magnitude of an integer (64 bits)
MOST_NODES = 100_000  # most values of a YAML text with all aliases expanded
_TOO_DEEP = f"it nests deeper than {DEEPEST} levels"


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; raise `ValueError` if it is invalid or out of bounds."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_bounds(value)
    return value


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, with JSON's types only; dates stay strings."""
    try:
        node = yaml.compose(text, _PlainLoader)
        if node is None:
            return None
        _check_size(node)
        value = _PlainLoader("").construct_document(node)
    except (yaml.YAMLError, LookupError) as error:  # `!!bool maybe` raises KeyError
        raise ValueError(str(error)) from error
    _check_bounds(value)
    return value


class _PlainLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` with JSON's types only and a limit on nesting."""

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.level += 1
        if self.level > DEEPEST + 1:
            raise ValueError(_TOO_DEEP)
        found = super().compose_node(parent, index)
        self.level -= 1
        return found


_TAG = "tag:yaml.org,2002:"
_TYPES = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_PlainLoader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag in _TYPES or tag is None  # the constructor for None refuses all other tags
}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _check_size(node: yaml.Node) -> None:
    """Refuse too many values, deep nesting, repeated keys, and lone surrogates in strings."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, level: int) -> int:
        if level > DEEPEST:
            raise ValueError(_TOO_DEEP)
        if id(node) not in sizes:
            inside = node.value
            if isinstance(node, yaml.ScalarNode):
                inside.encode("utf-8")
                inside = []
            elif isinstance(node, yaml.MappingNode):
                _check_keys(node)
                inside = chain.from_iterable(node.value)
            sizes[id(node)] = 1 + sum(size(inner, level + 1) for inner in inside)
        return sizes[id(node)]

    if size(node, 0) > MOST_NODES:
        raise ValueError(f"its aliases stand for more than {MOST_NODES} values")


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse repeated keys, of which PyYAML silently uses the last value."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            continue
        if first := lines.get((key.tag, key.value)):
            raise ValueError(
                f"the key {key.value!r} stands twice, in lines {first} and {line}: leave one of "
                "them out"
            )
        lines[key.tag, key.value] = line


def _check_bounds(value: Any) -> None:
    """Refuse deep nesting and huge integers."""
    level = [value]
    for _ in range(DEEPEST + 1):
        if not all(-LARGEST <= one <= LARGEST for one in level if isinstance(one, int)):
            raise ValueError(f"it holds a whole number beyond {LARGEST}")
        dicts = [one for one in level if isinstance(one, dict)]
        lists = [one for one in level if isinstance(one, list)]
        level = [*chain(*dicts, *map(dict.values, dicts), *lists)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def read_yaml(path: Path, name: str) -> dict[Any, Any]:
    """Return the keys and values of a YAML file; `name` is the command's argument in messages."""
    if not path.is_file():
        raise ConfigError(f"{name} must be a YAML file, but got {path}, which is not a file.")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{name} must be a YAML file, but got {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must contain keys and values, but got {path} without any.")
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        flat.update(nested if nested is not None else {f"{prefix}{key}": value})
    return flat
