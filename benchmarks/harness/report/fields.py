"""Read and check the values of a record, with errors that name key and file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora.errors import RunFileError


@dataclass(frozen=True, slots=True)
class Fields:
    """The values of an object in a record, each checked when read.

    Every method raises `RunFileError` if the value is missing or invalid, unless its docstring says
    that it may be missing.
    """

    path: Path
    values: Mapping[str, Any]
    place: str = ""
    """Dotted prefix of the keys."""

    def inside(self, key: str) -> "Fields":
        """Return the object under a key."""
        found = self._needed(key)
        if isinstance(found, dict):
            return Fields(self.path, found, f"{self.place}{key}.")
        raise self._wrong(key, "an object", found)

    def name(self, key: str) -> str:
        """Return a non-empty, printable text on one line."""
        found = self._needed(key)
        if isinstance(found, str) and found.strip() and found.isprintable():
            return found
        raise self._wrong(key, "a name of printable characters", found)

    def text(self, key: str) -> str:
        """Return a text without unprintable characters, empty if missing or null."""
        found = self.values.get(key)
        if found is None:
            return ""
        if isinstance(found, str):
            return "".join(c if c.isprintable() or c == "\n" else " " for c in found)
        raise self._wrong(key, "a text or null", found)

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        """Return one of the known words."""
        found = self._needed(key)
        if found in known:
            return str(found)
        raise self._wrong(key, f"one of {', '.join(known)}", found)

    def whole(self, key: str) -> int:
        """Return a whole number of at least 0."""
        found = self._needed(key)
        if type(found) is int and found >= 0:
            return found
        raise self._wrong(key, "a whole number of at least 0", found)

    def number(self, key: str) -> float:
        """Return a number; NaN for null, which represents non-finite numbers in JSON."""
        found = self._needed(key)
        if found is None:
            return math.nan
        if type(found) is int or type(found) is float:
            return float(found) if abs(found) < math.inf else math.nan
        raise self._wrong(key, "a number or null", found)

    def flag(self, key: str) -> bool | None:
        """Return a boolean; None if null or missing."""
        found = self.values.get(key)
        if found is None or isinstance(found, bool):
            return found
        raise self._wrong(key, "true, false or null", found)

    def ranks(self, key: str) -> Mapping[str, int]:
        """Return ranks by module name; empty for a method without ranks."""
        inside = self.inside(key)
        return {name: inside.whole(name) for name in inside.values}

    def _needed(self, key: str) -> Any:
        if key not in self.values:
            raise RunFileError(
                f"{self.path} must hold `{self.place}{key}`, got an object without it: run the "
                "study again, or move the file out of the results."
            )
        return self.values[key]

    def _wrong(self, key: str, required: str, given: object) -> RunFileError:
        return RunFileError(
            f"`{self.place}{key}` of {self.path} must be {required}, got {str(given)[:60]!r}: run "
            "the study again, or move the file out of the results."
        )
