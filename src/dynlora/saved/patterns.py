"""Patterns of names in an adapter's configuration to each layer's rank or `lora_alpha`.

PEFT reads the keys as regular expressions. An adapter from elsewhere may have one that never ends
(`(a|a)*[bc]`), and Python's own `re` cannot be stopped, so `regex` matches, which has a timeout.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from dynlora.errors import AdapterError
from dynlora.name_patterns import LONGEST

SECONDS = 0.05
"""Processor time for one key and one name; keys that PEFT writes need a millionth of a second."""
SECONDS_OF_ALL = 10
"""Processor time for all keys of a field: one key per layer of 2,401 layers needs 4 to 6 s."""
BAD_PATTERN = (re.error, regex.error, OverflowError, RecursionError)
"""Errors for a text that is no regular expression, or one with absurd numbers."""


def match_names(
    given: Mapping[str, Any], names: Sequence[str], default: Any, *, field: str, where: str
) -> dict[str, Any]:
    """Return each layer's value: that of the first key that matches the end of its name.

    This is PEFT's `get_pattern_key`, without PEFT, which takes seconds to import.

    Args:
        given: Value by key.
        names: The layers' names.
        default: The value of a layer that no key matches.
        field: `rank_pattern` or `alpha_pattern`.
        where: The adapter, for messages.

    Raises:
        AdapterError: If a key is no regular expression or too long, or matching takes too long.
    """
    deadline = time.process_time() + SECONDS_OF_ALL
    found: dict[str, Any] = {}
    unmatched = list(names)
    for key, value in given.items():
        if time.process_time() > deadline:
            raise AdapterError(
                f"all keys of `{field}` must match the layers' names within {SECONDS_OF_ALL} s, "
                f"got {len(given)} keys and {len(names)} layers in {where}: put the names of "
                "layers with the same value into one key, `^(name|name)$`."
            )
        pattern = _compile(key, field, where)
        for name in unmatched:
            try:
                if pattern.match(name, timeout=SECONDS):
                    found[name] = value
            except TimeoutError as error:
                raise AdapterError(
                    f"each key of `{field}` must match a layer's name within {SECONDS} s, "
                    f"got {key!r} in {where}, which does not: name the layers themselves."
                ) from error
        if len(found) + len(unmatched) > len(names):
            unmatched = [name for name in unmatched if name not in found]
    return {name: found.get(name, default) for name in names}


def _compile(key: str, field: str, where: str) -> Any:
    """Return a key as PEFT matches it, at the end of a name."""
    if len(key) > LONGEST:
        raise AdapterError(
            f"each key of `{field}` must have at most {LONGEST} characters, got one of "
            f"{len(key)} in {where}: name the layers themselves."
        )
    whole = rf"(.*\.)?({key})$"
    try:
        re.compile(whole)
        return regex.compile(whole)
    except BAD_PATTERN as error:
        raise AdapterError(
            f"each key of `{field}` must be a regular expression, got {key!r} in {where}: {error}."
        ) from error
