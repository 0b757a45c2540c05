"""Values of PEFT's `LoraConfig`: patterns of ranks and alphas, and starts that change the base.

Without torch, because the command line reads these values before it loads torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

LONGEST = 2000
"""Most characters of a key; readers refuse longer keys in foreign files."""


def name_patterns(values: Mapping[str, float], default: float) -> dict[str, int | float]:
    """Return the values that differ from `default` by regular expression, as `int` if integral.

    One key of at most `LONGEST` characters (or one name) matches many layers, because Python's
    cache of compiled expressions has 512 entries: see `docs/adapters.md`.
    """
    names: dict[float, list[str]] = {}
    for name, value in values.items():
        if value != default:
            names.setdefault(value, []).append(re.escape(name))
    return {key: whole(value) for value in names for key in _alternations(names[value])}


def whole(value: float) -> int | float:
    """Return an integral value as an `int`, and any other value unchanged."""
    return int(value) if value == int(value) else value


def _alternations(escaped: Sequence[str]) -> Iterator[str]:
    """Return patterns that together match exactly these names."""
    first, length = 0, 0
    for index, name in enumerate(escaped):
        if index > first and length + len(name) > LONGEST - len("^()$"):
            yield f"^({'|'.join(escaped[first:index])})$"
            first, length = index, 0
        length += len(name) + len("|")
    yield f"^({'|'.join(escaped[first:])})$"


def changes_base(start: object) -> bool:
    """Return whether a value of `init_lora_weights` moves base weights into the adapter.

    PEFT repeats such an initialization when it loads the adapter, at the saved rank.
    """
    return str(start).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
