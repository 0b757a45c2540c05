"""Read a job from a YAML file and overrides, and write the resolved `config.yaml` of a run."""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dynlora.errors import ConfigError
from dynlora.files.plain_values import flatten, parse_yaml, read_yaml
from dynlora.files.whole import write_text
from dynlora.train.config import JobConfig, keys
from dynlora.train.config.adapter import CEILING
from dynlora.train.config.sections import require

OUT_OF_RANGE = ("greater", "less")
"""First words of pydantic's names of errors for numbers outside their limits."""


def read_job(path: Path, overrides: Mapping[str, Any] | None = None) -> JobConfig:
    """Read a job from a YAML file; `overrides`, values or texts by dotted key, win.

    Raises:
        ConfigError: If the file or a value is invalid; the message names the key and its place.
    """
    overrides = overrides or {}
    values = read_yaml(path, "CONFIG")
    keys.check_keys(values, f"in {path}")
    for key, value in overrides.items():
        section, _, leaf = key.rpartition(".")
        if section:
            values[section] = {**values.get(section, {}), leaf: value}
        else:
            values[leaf] = value
    return _validate(values, lambda key: "command line" if key in overrides else str(path))


def make_job(values: Mapping[str, Any]) -> JobConfig:
    """Return the job of nested values, as in a file."""
    keys.check_keys(values, "in a job")
    return _validate(values, lambda _: "")


def _validate(values: Mapping[str, Any], place: Callable[[str], str]) -> JobConfig:
    """Return the job, or raise an error for the first fault, with requirement, value and place."""
    sections = keys.sections()
    values = {key: dict(value) if key in sections else value for key, value in values.items()}
    for key, value in flatten(values).items():
        if key in keys.settings() and isinstance(value, str):
            section, _, leaf = key.rpartition(".")
            (values[section] if section else values)[leaf] = _read_text(key, value)
    try:
        return keys.job_adapter().validate_python(_with_ceiling(values))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"][:2]))
        key = name if name in keys.settings() else str(fault["loc"][0])
        where = f" ({place(key)})" if place(key) else ""
        if fault["type"] == "missing":
            option = f"--{key}" if key in keys.settings() else f"--{key}.name"
            raise ConfigError(
                f"`{key}` must be given, but got nothing{where}. Add it, or use {option}."
            ) from error
        section, _, leaf = key.rpartition(".")
        value = (values[section] if section else values)[leaf]
        numeric = fault["type"].startswith(OUT_OF_RANGE)
        required = (keys.limits if numeric else keys.describe)(keys.settings()[key])
        plain = isinstance(value, str) and value.strip()
        shown = value if plain else json.dumps(value, default=str)
        raise ConfigError(
            f"`{key}` must be {required}, but got {shown}{where}.{_advise(key, value)}"
        ) from error


def _with_ceiling(values: dict[str, Any]) -> dict[str, Any]:
    """Replace `lora.r: auto` by the highest rank and a search for the ranks that are needed."""
    lora, method = values.get("lora", {}), values.get("method", "dynamic")
    if lora.get("r") != "auto":
        return values
    require(method == "dynamic", "lora.r", f"a whole number with `method: {method}`", "auto")
    dynamic = {"budget_end": "auto"} | values.get("dynamic", {})
    return values | {"lora": lora | {"r": CEILING}, "dynamic": dynamic}


def _read_text(key: str, text: str) -> Any:
    """Return the value of a text from an option or in quotes; only texts are not read as YAML."""
    schema = keys.settings()[key]
    parts = schema.get("anyOf", [schema])
    listed = text.startswith("[") and any(part["type"] == "array" for part in parts)
    free = not listed and any(p["type"] == "string" and not keys.choices(p) for p in parts)
    if free or text in keys.choices(schema) or not text.strip():
        return None if text in ("null", "~") and {"type": "null"} in parts else text
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def _advise(key: str, value: Any) -> str:
    """Return the next step for a value near a valid one; may be empty."""
    valid = keys.choices(keys.settings()[key])
    if value is False and "no" in valid:
        return " YAML reads a bare no as false. Write 'no' in quotes."
    near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.4)
    if not near:
        return ""
    if near == [value]:
        return f" Write it as a list: [{value}]."
    return f" The nearest valid value is {near[0]}."


def plain_values(config: JobConfig) -> dict[str, Any]:
    """Return the configuration as plain YAML and JSON values.

    Paths are absolute, because runs are used from other directories.
    """
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))  # tuples become lists
    model, data, lora = values["model"], values["data"], values["lora"]
    places = [(values, "output"), (model, "path"), (data, "path"), (lora, "start_from")]
    if model["teacher"] is not None and Path(model["teacher"]).is_dir():
        places.append((model, "teacher"))
    for section, key in places:
        if section[key] is not None:
            section[key] = str(Path(section[key]).absolute())
    return values


def write_config(path: Path, config: JobConfig) -> None:
    """Write the configuration, but reset `resume`, and `overwrite`, which would delete the run."""
    values = plain_values(config)
    values["overwrite"], values["training"]["resume"] = False, "none"
    write_text(path, yaml.safe_dump(values, sort_keys=False))
