"""The keys of a job: JSON Schema, valid values in words, and errors that name the nearest key."""

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from dynlora.errors import ConfigError
from dynlora.train.config.job import JobConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
NAMES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "null": "null",
}
SHOWN = 3
"""Maximum number of near names in an error."""
Schema = Mapping[str, Any]


@cache
def job_adapter() -> TypeAdapter[JobConfig]:
    """Return pydantic's validator of a job."""
    return TypeAdapter(JobConfig)


@cache
def job_schema() -> Schema:
    """Return the JSON Schema of a job file (draft 2020-12), with each section in its place."""
    found = job_adapter().json_schema()
    schema = _inline(found, found.pop("$defs"))
    return {"$schema": DRAFT, "title": "dynlora train"} | schema


def _inline(schema: Schema, parts: Schema) -> dict[str, Any]:
    """Replace references by their parts, and drop pydantic's titles."""
    whole = dict(parts[schema["$ref"].rpartition("/")[2]]) if "$ref" in schema else {}
    whole |= {key: value for key, value in schema.items() if key not in ("$ref", "title")}
    whole.pop("title", None)
    if "description" in whole:
        whole["description"] = " ".join(whole["description"].split())
    if "properties" in whole:
        inside = whole["properties"].items()
        whole["properties"] = {key: _inline(value, parts) for key, value in inside}
    return whole


@cache
def sections() -> Mapping[str, Schema]:
    """Return the schema of each section."""
    return {key: part for key, part in job_schema()["properties"].items() if "properties" in part}


@cache
def settings() -> Mapping[str, Schema]:
    """Return the schema of each dotted key that has a value, in the order of the file."""
    found: dict[str, Schema] = {}
    for key, schema in job_schema()["properties"].items():
        inside = schema.get("properties")
        found |= {key: schema} if inside is None else {f"{key}.{k}": s for k, s in inside.items()}
    return found


def words(schema: Schema) -> list[str]:
    """Return the valid words of a setting; empty if any text or number may be valid."""
    parts = schema.get("anyOf", [schema])
    found = [word for part in parts for word in _named(part)]
    found += ["true", "false"] if any(part.get("type") == "boolean" for part in parts) else []
    return [*found, "null"] if found and {"type": "null"} in parts else found


def choices(schema: Schema) -> list[str]:
    """Return the names that a setting, or an item of its list, may have."""
    parts = schema.get("anyOf", [schema])
    return [name for part in parts for name in _named(part.get("items", part))]


def _named(schema: Schema) -> list[str]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum", []))


def describe(schema: Schema) -> str:
    """Return the valid values of a setting in words, such as `a number > 0 or null`."""
    if "anyOf" in schema:
        return " or ".join(describe(part) for part in schema["anyOf"])
    if names := _named(schema):
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if schema["type"] == "array":
        names = _named(schema["items"])
        return f"a list of {', '.join(names)}" if names else "a list such as [a, b]"
    return f"{NAMES[schema['type']]} {limits(schema)}".rstrip()


def limits(schema: Schema) -> str:
    """Return the limits of a number in words, such as `>= 0 and < 1`; empty without limits."""
    parts = schema.get("anyOf", [schema])
    found = [f"{LIMITS[key]} {part[key]}" for part in parts for key in LIMITS if key in part]
    return " and ".join(found)


def check_keys(values: Mapping[Any, Any], where: str) -> None:
    """Raise a `ConfigError` for an unknown key or a section without keys; `where` is the place."""
    for key, value in values.items():
        if key in settings() and "." in key:
            section, _, leaf = key.partition(".")
            advice = f"Write it in its section, `{section}: {{{leaf}: ...}}`."
            raise ConfigError(f"unknown key `{key}` {where}. {advice}")
        if key in settings():
            continue
        if key not in sections():
            raise unknown_key(str(key), where)
        if not isinstance(value, Mapping):
            inside = ", ".join(sections()[key]["properties"])
            given = "null" if value is None else value
            raise ConfigError(f"`{key}` must contain keys, but got {given} {where}: {inside}.")
        for leaf in value:
            if f"{key}.{leaf}" not in settings():
                raise unknown_key(f"{key}.{leaf}", where)


def unknown_key(key: str, where: str) -> ConfigError:
    """Return the error, with names of the same last part or initials (`lr`), or spelled alike."""
    section, _, leaf = key.rpartition(".")
    leaves = {name: name.rpartition(".")[2] for name in (*sections(), *settings())}
    alike = difflib.get_close_matches
    initials = {name: "".join(word[:1] for word in leaves[name].split("_")) for name in leaves}
    near = (
        [name for name, last in leaves.items() if leaf in (last, initials[name])]
        or alike(key, leaves, n=SHOWN, cutoff=0.75)
        or [name for name, last in leaves.items() if alike(leaf, [last], cutoff=0.7)]
    )
    inside = [name for name in leaves if name.rpartition(".")[0] == section]
    names = ", ".join(f"`{name}`" for name in (near[:SHOWN] or inside or sections()))
    advice = f"The nearest valid name is {names}" if near else f"Valid names are {names}"
    return ConfigError(f"unknown key `{key}` {where}. {advice}.")
