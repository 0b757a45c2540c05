"""Read YAML and `run.json` as plain values, with errors that name file and key."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora.errors import RunFileError
from dynlora.files.json_files import as_object, read_text
from dynlora.files.plain_values import parse_yaml


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the YAML mapping in a file.

    Raises:
        RunFileError: If the file is missing or is not a YAML mapping.
    """
    text = read_text(path)
    try:
        return as_object(parse_yaml(text))
    except ValueError as error:
        raise RunFileError(
            f"{path} must be the YAML of a run's configuration, got {len(text)} characters that "
            f"are not ({error}): restore the file from a copy, or train again."
        ) from error


def is_number(value: object) -> bool:
    """Return whether a value is a finite int or float; booleans are not numbers."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def numbers(path: Path, values: Mapping[str, Any], key: str) -> dict[str, float | None]:
    """Return the object of numbers under a key of `run.json`; empty if the key is missing.

    Raises:
        RunFileError: If the value is not an object of numbers or nulls.
    """
    found = values.get(key, {})
    if isinstance(found, dict) and all(one is None or is_number(one) for one in found.values()):
        return found
    raise wrong_value(path, key, "an object of numbers", found)


def whole(path: Path, values: Mapping[str, Any], key: str) -> int | None:
    """Return the whole number under a key of `run.json`; None if the key is missing.

    Raises:
        RunFileError: If the value is not a whole number or null.
    """
    found = values.get(key)
    if found is None or type(found) is int:
        return found
    raise wrong_value(path, key, "a whole number", found)


def wrong_value(path: Path, key: str, required: str, given: object) -> RunFileError:
    """Return the error for a wrong value in `run.json`."""
    return RunFileError(
        f"`{key}` of {path} must be {required}, got {str(given)[:60]!r}: restore the file from a "
        "copy, or train again."
    )
