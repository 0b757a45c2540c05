"""`dynlora schema`: print the configuration's JSON Schema (draft 2020-12).

Editors use it to complete and describe keys and to mark invalid values. Rules that involve several
keys are checked only by the command line.
"""

import ast
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dynlora.cli.arguments import VerbParser, parse, verb_parser
from dynlora.cli.output import Output
from dynlora.config import PRESET_TEXT, DynamicLoraConfig, PresetName
from dynlora.train.config import JobConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
NUMBER = r"(-?\d+(?:\.\d+)?)"
END = r"(?=[.,;]|$)"
"""A range must end its clause, so that `below 1 sharpens` does not match."""


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: Words after `schema` on the command line.
        output: Prints the schema, even with `--quiet`.

    Raises:
        DynamicLoraError: If an argument is unknown.
    """
    if parse(make_parser(), arguments) is None:
        return
    schema = job_schema()
    output.write(json.dumps(schema, indent=2), schema)


def make_parser() -> VerbParser:
    """Return the verb's parser."""
    return verb_parser("schema")


def job_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file for `dynlora train`."""
    return {"$schema": DRAFT, "title": "dynlora train"} | _object(JobConfig)


def _object(kind: Any) -> dict[str, Any]:
    """Return the schema of a dataclass, which allows no other keys."""
    hints = get_type_hints(kind)
    own = {"preset": _preset()} if kind is DynamicLoraConfig else {}
    schema = {
        "type": "object",
        "description": _flat(inspect.getdoc(kind) or ""),
        "properties": own | {f.name: _key(kind, f, hints[f.name]) for f in fields(kind)},
        "additionalProperties": False,
    }
    required = [
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    return schema | ({"required": required} if required else {})


def _key(kind: Any, field: Field[Any], hint: Any) -> dict[str, Any]:
    text = describe(kind)[field.name]
    if is_dataclass(hint):
        return _object(hint) | {"description": text}
    default = {} if field.default is MISSING else {"default": _plain(field.default)}
    return _type(hint, text) | {"description": text} | default


def _preset() -> dict[str, Any]:
    """Return the schema of `preset`, which is not a field."""
    return _type(PresetName, "") | {"description": PRESET_TEXT, "default": "default"}


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def _type(hint: Any, text: str) -> dict[str, Any]:
    """Return the schema of a type; numbers include the range in their description."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in {Union, UnionType}:
        return {"anyOf": [_type(part, text) for part in parts]}
    if origin is tuple:
        return {"type": "array", "items": _type(parts[0], "")}
    return {"type": TYPES[hint]} | (stated_range(text) if hint in {int, float} else {})


def stated_range(text: str) -> dict[str, float]:
    """Return the numeric limits in a key's description as JSON Schema keywords.

    Args:
        text: Description, such as `Dropout, in [0, 1).` or `Batches, at least 1.`.
    """
    if found := re.search(rf"\bin ([\[(]){NUMBER}, {NUMBER}([\])]){END}", text, re.IGNORECASE):
        opening, low, high, closing = found.groups()
        lower = "minimum" if opening == "[" else "exclusiveMinimum"
        upper = "maximum" if closing == "]" else "exclusiveMaximum"
        return {lower: _number(low), upper: _number(high)}
    if found := re.search(rf"\b(at least|above) {NUMBER}{END}", text, re.IGNORECASE):
        limit = "minimum" if found[1].lower() == "at least" else "exclusiveMinimum"
        return {limit: _number(found[2])}
    return {}


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)


@cache
def describe(kind: Any) -> Mapping[str, str]:
    """Return the docstring of each field of a dataclass on one line, by field name."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    described = {"preset": PRESET_TEXT} if kind is DynamicLoraConfig else {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                described[name] = _flat(text)
    return described


def _flat(text: str) -> str:
    return " ".join(text.split())
