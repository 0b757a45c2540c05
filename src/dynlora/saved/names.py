"""The order of a model's layers by their names, which may be any text that a file holds."""


def natural_key(name: str) -> list[tuple[bool, int, str, str]]:
    """Return a key that sorts a layer's name so that blocks count as numbers do: 2 before 10."""
    return [_part_key(part) for part in name.split(".")]


def _part_key(part: str) -> tuple[bool, int, str, str]:
    if not part.isdecimal():
        return True, 0, "", part
    # Longer numbers are larger ones; Python makes no number of thousands of digits.
    digits = part.lstrip("0")
    return False, len(digits), digits, part
