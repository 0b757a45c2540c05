"""JSON files with one object per file or per line, NaN as null: written and read."""

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dynlora.errors import DynamicLoraError, RunFileError
from dynlora.files.plain_values import parse_json
from dynlora.files.whole import naming, write_text

FORMAT = "format"
WRITER = "dynlora"  # key of the version of dynlora that wrote the file


def finite(value: Any) -> Any:
    """Return a copy with NaN and infinity replaced by None."""
    match value:
        case float():
            return value if abs(value) < float("inf") else None
        case list() | tuple():
            return [finite(item) for item in value]
        case dict():
            return {key: finite(item) for key, item in value.items()}
    return value


def to_json(values: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return an object as JSON, on one line unless `indent` is set."""
    try:
        return json.dumps(values, indent=indent, allow_nan=False)
    except ValueError:  # a copy without NaN, which is slow for an event of thousands of layers
        return json.dumps(finite(values), indent=indent, allow_nan=False)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, atomically."""
    write_text(path, to_json(values, indent=2) + "\n")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one object per line, atomically."""
    write_text(path, "".join(to_json(line) + "\n" for line in lines))


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one object as a line."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(to_json(line) + "\n")


def read_text(path: Path, start: int = 0) -> str:
    """Return the text of a run's file from byte `start`; raise `RunFileError` if that fails."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(
            f"a run's folder must hold a readable {path.name}, got {error} for {path}: give the "
            "folder that `dynlora train` wrote, or train again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a run's file; raise `RunFileError` if it is anything else."""
    return read_object(path, parse_json, "one whole JSON object")


def read_object(path: Path, parse: Callable[[str], Any], form: str) -> dict[str, Any]:
    """Return the object in a run's file; raise `RunFileError`, which names the `form`, if none."""
    text = read_text(path)
    try:
        return as_object(parse(text))
    except ValueError as error:
        raise RunFileError(
            f"{path} must be {form}, got {len(text)} characters that are not ({error}): restore "
            "the file from a copy, or train again."
        ) from error


def read_lines(
    path: Path, start: int = 0, first: int = 1
) -> tuple[list[dict[str, Any]], bool, int]:
    """Return the objects in a run's file of lines, whether the last is incomplete, and the end.

    An incomplete last line, left by a killed process, is skipped, and does not count for the end in
    bytes. A missing file counts as empty. `start` is the end of an earlier reading, `first` the
    number of the line there.
    """
    if not path.exists():
        return [], False, 0
    text = read_text(path, start)
    *lines, rest = text.split("\n")
    found = []
    for number, line in enumerate(lines, start=first):
        try:
            found.append(as_object(parse_json(line)))
        except ValueError as error:
            raise broken_line(path, number, f"{line[:40]!r} ({error})") from error
    return found, bool(rest), start + len(text.encode()) - len(rest.encode())


def broken_line(path: Path, number: int, given: str) -> RunFileError:
    """Return the error for a malformed line of a run's file."""
    return RunFileError(
        f"each line of {path} must be a JSON object as `dynlora train` writes it, got {given} in "
        f"line {number}: remove that line, or restore the file from a copy."
    )


def as_object(value: Any) -> dict[str, Any]:
    """Return a parsed value if it is an object; raise `ValueError` otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"not an object but {type(value).__name__}")
    return value


def stamp(newest: int) -> dict[str, int | str]:
    """Return the values that mark a file as written in the newest format."""
    return {FORMAT: newest, WRITER: version("dynlora")}


def check_format(
    path: Path, values: Mapping[str, Any], newest: int, error: type[DynamicLoraError]
) -> None:
    """Raise `error` unless a file's format is a whole number from 1 to `newest`."""
    found = values.get(FORMAT, 1)
    if type(found) is not int or found < 1:
        raise error(
            f"`{FORMAT}` of {path} must be a whole number from 1 to {newest}, but got "
            f"{str(found)[:60]!r}: restore the file from a copy."
        )
    if found > newest:
        raise error(
            f"{path} was written by dynlora {str(values.get(WRITER, 'of a later version'))[:60]}, "
            f"format {found}; this version reads up to {newest}: upgrade dynlora."
        )
