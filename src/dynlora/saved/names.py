"""Names in an adapter's file, which may be any text: their greatest length and their order."""

from collections.abc import Iterable

from dynlora.errors import AdapterError
from dynlora.name_patterns import LONGEST


def check_names(names: Iterable[str], path: object) -> None:
    """Check that every tensor's name is short enough to be shown.

    Args:
        names: The names.
        path: The file, for the message.

    Raises:
        AdapterError: If one is too long.
    """
    longest = max(map(len, names), default=0)
    if longest > LONGEST:
        raise AdapterError(
            f"each tensor's name must have at most {LONGEST} characters, got one of {longest} in "
            f"{path}: save the adapter again."
        )


def natural_key(name: str) -> list[tuple[bool, int, str, str]]:
    """Return a key that sorts a layer's name so that blocks count as numbers do: 2 before 10."""
    return [_part_key(part) for part in name.split(".")]


def _part_key(part: str) -> tuple[bool, int, str, str]:
    if not part.isdecimal():
        return True, 0, "", part
    # Longer numbers are larger ones; Python makes no number of thousands of digits.
    digits = part.lstrip("0")
    return False, len(digits), digits, part
