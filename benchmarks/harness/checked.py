"""Check values of files with pydantic, with errors that name the key, the value and the place."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dynlora.errors import DynamicLoraError

WORDS = {
    "bool_type": "must be true or false",
    "dict_type": "must be keys and values",
    "int_type": "must be a whole number",
    "model_type": "must be keys and values",
    "string_pattern_mismatch": "must be a name of letters, digits and _.+-",
    "string_type": "must be a text",
    "too_short": "must have at least one entry",
    "tuple_type": "must be a list",
}
"""Requirements by pydantic's type of error, where its message is not plain."""
Model = TypeVar("Model", bound=BaseModel)


def check(
    kind: type[Model], values: Mapping[str, Any], place: object, error: type[DynamicLoraError]
) -> Model:
    """Return the nested values of a file as a model; `place` names the file in messages.

    Raises:
        DynamicLoraError: Of class `error`, for the first key that is unknown, missing or invalid.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as found:
        raise error(_explain(found.errors(include_url=False)[0], kind, place)) from found


def _explain(fault: ErrorDetails, kind: type[BaseModel], place: object) -> str:
    key = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    match fault["type"]:
        case "missing":
            return f"`{key}` must be given, but got nothing ({place})."
        case "extra_forbidden":
            return f"unknown key `{key}` ({place}). {_valid_names(fault, kind)}."
        case "value_error":
            required = str(fault["ctx"]["error"])
        case _:
            required = WORDS.get(fault["type"], fault["msg"].replace("Input should", "must"))
    given = "null" if fault["input"] is None else str(fault["input"])[:60]
    return f"`{key}` {required}, but got {given} ({place})."


def _valid_names(fault: ErrorDetails, kind: type[BaseModel]) -> str:
    """Return the nearest valid names of an unknown key."""
    *sections, key = map(str, fault["loc"])
    for section in sections:
        hint = kind.model_fields[section].annotation
        parts = getattr(hint, "__args__", (hint,))  # the section may be optional
        kind = next(
            part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)
        )
    known = [field.alias or name for name, field in kind.model_fields.items()]
    near = difflib.get_close_matches(key, known, n=1)
    names = ", ".join(f"`{'.'.join([*sections, name])}`" for name in near or known)
    return f"{'The nearest valid name is' if near else 'Valid names are'} {names}"
