"""Format version of a file of plain values: newer layouts are refused with their writer's version.

A file without a version has format 1, the first layout.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dynlora.errors import DynamicLoraError

FORMAT = "format"
WRITER = "dynlora"
"""Key of the version of dynlora that wrote the file."""


def stamp(newest: int) -> dict[str, int | str]:
    """Return the values that mark a file as written in the newest format."""
    return {FORMAT: newest, WRITER: version("dynlora")}


def check_format(
    path: Path, values: Mapping[str, Any], newest: int, error: type[DynamicLoraError]
) -> None:
    """Check that this version reads the format of a file.

    Args:
        path: The file.
        values: Its content.
        newest: Newest format that this version reads; all older ones are read too.
        error: Class of the error.

    Raises:
        DynamicLoraError: As `error`, if the format is newer or is not a positive whole number.
    """
    found = values.get(FORMAT, 1)
    if type(found) is not int or found < 1:
        raise error(
            f"`{FORMAT}` of {path} must be a whole number from 1 to {newest}, but got "
            f"{str(found)[:60]!r}: restore the file from a copy."
        )
    if found > newest:
        raise error(
            f"{path} was written by dynlora {str(values.get(WRITER, 'of a later version'))[:60]}, "
            f"format {found}; this version reads up to {newest}: upgrade dynlora."
        )
