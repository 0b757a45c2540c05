"""Read and check values of a study's file, with errors that name the key."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Fields:
    """Keys and values at one level of the file."""

    values: Mapping[str, Any]
    file: Path
    place: str = ""
    """Dotted prefix of the keys."""

    def check_known(self, keys: Sequence[str]) -> None:
        """Check that all keys are known.

        Raises:
            ConfigError: If a key is unknown.
        """
        for key in self.values:
            if key in keys:
                continue
            near = difflib.get_close_matches(str(key), keys, n=1)
            names = ", ".join(f"`{self.place}{name}`" for name in (near or keys))
            advice = f"the nearest valid name is {names}" if near else f"valid names are {names}"
            raise ConfigError(f"unknown key `{self.place}{key}` in {self.file}: {advice}.")

    def inside(self, key: str) -> "Fields":
        """Return the keys and values under a key."""
        return Fields(self.mapping(key), self.file, f"{self.place}{key}.")

    def section(self, key: str) -> "Fields | None":
        """Return the keys and values under a key; None if it is missing or null."""
        return None if self.values.get(key) is None else self.inside(key)

    def mapping(self, key: str, default: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Return the mapping under a key."""
        found = self._given(key, default)
        if isinstance(found, dict):
            return found
        raise self.wrong(key, "keys and values", found)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a non-empty text, or the default."""
        found = self._given(key, default)
        if isinstance(found, str) and (found.strip() or found == default):
            return found
        raise self.wrong(key, "a text", found)

    def whole(self, key: str, *, low: int) -> int:
        """Return a whole number of at least `low`."""
        return self._whole(key, self._given(key, None), low, "a whole number")

    def whole_numbers(self, key: str, *, low: int) -> tuple[int, ...]:
        """Return one or more distinct whole numbers of at least `low`."""
        found = tuple(self._whole(key, value, low, "whole numbers") for value in self._list(key))
        if len(set(found)) < len(found):
            raise self.wrong(key, "different numbers", list(found))
        return found

    def number(self, key: str, *, default: float) -> float:
        """Return a number above 0."""
        return self._number(key, self._given(key, default), "a number")

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return one or more numbers above 0."""
        return tuple(self._number(key, value, "numbers") for value in self._list(key))

    def wrong(self, key: str, required: str, given: object) -> ConfigError:
        """Return the error for an invalid value."""
        shown = "null" if given is None else given
        return ConfigError(f"`{self.place}{key}` in {self.file} must be {required}, got {shown}.")

    def _given(self, key: str, default: Any) -> Any:
        found = self.values.get(key, default)
        if found is None and key not in self.values:
            raise ConfigError(f"`{self.place}{key}` must be given in {self.file}, got nothing.")
        return default if found is None and default is not None else found

    def _list(self, key: str) -> list[Any]:
        found = self._given(key, None)
        if isinstance(found, list) and found:
            return found
        raise self.wrong(key, "a list of at least one number", found)

    def _whole(self, key: str, value: Any, low: int, required: str) -> int:
        if type(value) is int and value >= low:
            return value
        raise self.wrong(key, f"{required} of at least {low}", value)

    def _number(self, key: str, value: Any, required: str) -> float:
        # YAML parses 3e-4 as text (only 3.0e-4 as a number).
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if 0 < number < math.inf:
            return number
        raise self.wrong(key, f"{required} above 0", value)
