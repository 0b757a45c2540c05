"""Names of an adapter's layers: check their length, sort them, match the configuration's patterns.

An untrusted pattern may never finish (`(a|a)*[bc]`), so `regex`, which has a timeout, matches.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import regex

from dynlora.adapters.patterns import LONGEST
from dynlora.errors import AdapterError

SECONDS = 0.05  # processor time limit per key and name; keys of PEFT need about a microsecond
SECONDS_OF_ALL = 10  # for all keys of a field; 2,401 keys for as many layers need 4 to 6 s


def check_names(names: Iterable[str], path: object) -> None:
    """Raise `AdapterError` if a tensor name of a file is too long."""
    longest = max(map(len, names), default=0)
    if longest > LONGEST:
        raise AdapterError(
            f"each tensor's name must have at most {LONGEST} characters, but got one of {longest} "
            f"in {path}. Save the adapter again."
        )


def natural_key(name: str) -> list[tuple[bool, int, str, str]]:
    """Return a sort key that orders numbers in names by value (2 before 10)."""
    # Numbers are compared by length first: Python refuses to parse thousands of digits.
    return [
        (False, len(digits := part.lstrip("0")), digits, part)
        if part.isdecimal()
        else (True, 0, "", part)
        for part in name.split(".")
    ]


def match_names(
    patterns: Mapping[str, Any], names: Sequence[str], default: Any, *, field: str, where: str
) -> dict[str, Any]:
    """Return the value per layer, from the first key that matches the end of its name.

    Equivalent to PEFT's `get_pattern_key`, but does not import PEFT, which takes seconds.
    """
    deadline = time.process_time() + SECONDS_OF_ALL
    found: dict[str, Any] = {}
    unmatched = list(names)
    for key, value in patterns.items():
        if time.process_time() > deadline:
            raise AdapterError(
                f"all keys of `{field}` must match the layers' names within {SECONDS_OF_ALL} s, "
                f"but got {len(patterns)} keys and {len(names)} layers in {where}. Put the names "
                "of layers with the same value into one key, `^(name|name)$`."
            )
        pattern = _compile(key, field, where)
        for name in unmatched:
            try:
                if pattern.match(name, timeout=SECONDS):
                    found[name] = value
            except TimeoutError as error:
                raise AdapterError(
                    f"each key of `{field}` must match a layer's name within {SECONDS} s, but got "
                    f"{key!r} in {where}, which takes longer. Use the layers' names as keys."
                ) from error
        unmatched = [name for name in unmatched if name not in found]
    return {name: found.get(name, default) for name in names}


def _compile(key: str, field: str, where: str) -> Any:
    """Compile a key as PEFT does, to match the end of a name."""
    if len(key) > LONGEST:
        raise AdapterError(
            f"each key of `{field}` must have at most {LONGEST} characters, but got one of "
            f"{len(key)} in {where}. Use the layers' names as keys."
        )
    whole = rf"(.*\.)?({key})$"
    try:
        re.compile(whole)
        return regex.compile(whole)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"each key of `{field}` must be a regular expression, but got {key!r} in {where}: "
            f"{error}."
        ) from error
