"""Values of layers that differ from a default, as PEFT's `rank_pattern` and `alpha_pattern`."""

import re
from collections.abc import Iterator, Mapping, Sequence

LONGEST = 2000
"""Characters of a key at most: a longer one from elsewhere is refused when it is read."""


def name_patterns(values: Mapping[str, float], default: float) -> dict[str, int | float]:
    """Return the values of layers that differ from `default`, by regular expression.

    One key names many layers, because Python compiles each key again for every layer once there are
    more than 512: see `docs/adapters.md`.

    Args:
        values: Rank or `lora_alpha` by module name.
        default: The value of all other layers.

    Returns:
        Value by `^(name|name|...)$`, each key at most `LONGEST` characters unless a single name is
        longer. Whole values are whole numbers.
    """
    names: dict[float, list[str]] = {}
    for name, value in values.items():
        if value != default:
            names.setdefault(value, []).append(re.escape(name))
    return {key: whole(value) for value in names for key in _alternations(names[value])}


def whole(value: float) -> int | float:
    """Return a whole value as an `int`, any other unchanged."""
    return int(value) if value == int(value) else value


def _alternations(escaped: Sequence[str]) -> Iterator[str]:
    """Return patterns that together match these names and nothing else."""
    first, length = 0, 0
    for index, name in enumerate(escaped):
        if index > first and length + len(name) > LONGEST - len("^()$"):
            yield _alternation(escaped[first:index])
            first, length = index, 0
        length += len(name) + len("|")
    if escaped:
        yield _alternation(escaped[first:])


def _alternation(escaped: Sequence[str]) -> str:
    return f"^({'|'.join(escaped)})$"
