"""Check and sort tensor names from an adapter's file."""

from collections.abc import Iterable

from dynlora.adapters.patterns import LONGEST
from dynlora.errors import AdapterError


def check_names(names: Iterable[str], path: object) -> None:
    """Check that tensor names are not too long.

    Args:
        names: The names.
        path: The file, for the message.

    Raises:
        AdapterError: If a name is too long.
    """
    longest = max(map(len, names), default=0)
    if longest > LONGEST:
        raise AdapterError(
            f"each tensor's name must have at most {LONGEST} characters, got one of {longest} in "
            f"{path}: save the adapter again."
        )


def natural_key(name: str) -> list[tuple[bool, int, str, str]]:
    """Return a sort key that orders numbers in names by value (2 before 10)."""
    return [_part_key(part) for part in name.split(".")]


def _part_key(part: str) -> tuple[bool, int, str, str]:
    if not part.isdecimal():
        return True, 0, "", part
    # Compare by length first: Python refuses to parse thousands of digits.
    digits = part.lstrip("0")
    return False, len(digits), digits, part
