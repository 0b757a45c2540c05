"""A run's files as plain values: paths in, JSON and YAML out, with errors that name the place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dynlora.errors import RunFileError


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        RunFileError: If it is missing, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(
            f"a run's folder must hold a readable {path.name}, got {error} for {path}: give the "
            "folder that `dynlora train` wrote, or train again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        RunFileError: If the file is missing, cut short, or holds something else.
    """
    text = read_text(path)
    try:
        return _object(json.loads(text))
    except ValueError as error:
        raise RunFileError(
            f"{path} must be one whole JSON object, got {len(text)} characters that are not "
            f"({error}): restore the file from a copy, or train again."
        ) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the YAML mapping of a file.

    Raises:
        RunFileError: If the file is missing or holds something else.
    """
    text = read_text(path)
    try:
        return _object(yaml.safe_load(text))
    except (ValueError, yaml.YAMLError) as error:
        raise RunFileError(
            f"{path} must be the YAML of a run's configuration, got {len(text)} characters that "
            f"are not ({error}): restore the file from a copy, or train again."
        ) from error


def read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the JSON objects of a file of lines, and whether its last line was cut short.

    A last line without its end was being written when its process was killed, and is left out. A
    missing file holds no line.

    Raises:
        RunFileError: If a whole line is not a JSON object.
    """
    if not path.exists():
        return [], False
    *lines, rest = read_text(path).split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(_object(json.loads(line)))
        except ValueError as error:
            raise broken_line(path, number, f"{line[:40]!r} ({error})") from error
    return found, bool(rest)


def broken_line(path: Path, number: int, given: str) -> RunFileError:
    """Return the error for a line that is not what a run writes."""
    return RunFileError(
        f"each line of {path} must be a JSON object as `dynlora train` writes it, got {given} in "
        f"line {number}: remove that line, or restore the file from a copy."
    )


def numbers(path: Path, values: Mapping[str, Any], key: str) -> dict[str, float | None]:
    """Return the object of numbers under a key of `run.json`; empty where it is not yet there.

    Raises:
        RunFileError: If something else stands there.
    """
    found = values.get(key, {})
    if isinstance(found, dict) and all(map(_is_number_or_null, found.values())):
        return found
    raise wrong_value(path, key, "an object of numbers", found)


def whole(path: Path, values: Mapping[str, Any], key: str) -> int | None:
    """Return the whole number under a key of `run.json`; None where it is not yet there.

    Raises:
        RunFileError: If something else stands there.
    """
    found = values.get(key)
    if found is None or type(found) is int:
        return found
    raise wrong_value(path, key, "a whole number", found)


def wrong_value(path: Path, key: str, required: str, given: object) -> RunFileError:
    """Return the error for a key of `run.json` that holds something else."""
    return RunFileError(
        f"`{key}` of {path} must be {required}, got {str(given)[:60]!r}: restore the file from a "
        "copy, or train again."
    )


def _is_number_or_null(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"not an object but {type(value).__name__}")
    return value
