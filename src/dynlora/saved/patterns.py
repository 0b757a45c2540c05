"""Patterns by which an adapter's configuration gives layers a rank or `lora_alpha` of their own.

PEFT reads their keys as regular expressions. In an adapter from elsewhere one may be made to take
for ever (`(a|a)*[bc]`), and Python's own `re` cannot be stopped: matching is left to `regex`, which
reads the same and has a timeout.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from dynlora.errors import AdapterError

LONGEST = 2000
"""Characters of a key; names of layers have some tens."""
SECONDS = 0.05
"""Processor time that a key may take for a name; those that PEFT writes take a millionth."""
BAD_PATTERN = (re.error, regex.error, OverflowError, RecursionError)
"""What is raised for a text that is no regular expression, or one with absurd numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patterns:
    """Values by patterns of names."""

    field: str
    """`rank_pattern` or `alpha_pattern`."""
    where: str
    """The adapter, for messages."""
    _compiled: Sequence[tuple[str, Any, Any]]
    """Each key, as it is compiled, and its value."""

    def value_of(self, name: str, default: Any) -> Any:
        """Return a layer's value as PEFT finds it: of the first key that matches its name's end.

        This is PEFT's `get_pattern_key`, without PEFT: to load it takes longer than all else.

        Raises:
            AdapterError: If a key takes too long.
        """
        for key, pattern, value in self._compiled:
            try:
                if pattern.match(name, timeout=SECONDS):
                    return value
            except TimeoutError as error:
                raise AdapterError(
                    f"each key of `{self.field}` must match a layer's name within {SECONDS} s, "
                    f"got {key!r} in {self.where}, which does not: name the layers themselves."
                ) from error
        return default


def compile_patterns(given: Mapping[str, Any], field: str, where: str) -> Patterns:
    """Return patterns ready for use.

    Args:
        given: Value by key.
        field: `rank_pattern` or `alpha_pattern`.
        where: The adapter, for messages.

    Raises:
        AdapterError: If a key is no regular expression, or longer than any name.
    """
    compiled = []
    for key, value in given.items():
        if len(key) > LONGEST:
            raise AdapterError(
                f"each key of `{field}` must have at most {LONGEST} characters, got one of "
                f"{len(key)} in {where}: name the layers themselves."
            )
        whole = rf"(.*\.)?({key})$"
        try:
            re.compile(whole)
            compiled.append((key, regex.compile(whole), value))
        except BAD_PATTERN as error:
            raise AdapterError(
                f"each key of `{field}` must be a regular expression, got {key!r} in {where}: "
                f"{error}."
            ) from error
    return Patterns(field=field, where=where, _compiled=compiled)
