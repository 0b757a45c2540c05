"""Write a report page atomically, replacing only an earlier report."""

from pathlib import Path

from dynlora.errors import RunFileError
from dynlora.files import whole
from dynlora.report.page import MARK

HEAD_BYTES = 1000
"""Length of the file's beginning that contains `MARK`."""


def check_replaceable(path: Path) -> None:
    """Check that a path is free or contains an earlier report.

    Raises:
        RunFileError: If the path contains another file.
    """
    whole.check_replaceable(
        path,
        _is_report,
        required="a new file or an earlier report",
        otherwise="which is neither: give another name.",
        error=RunFileError,
    )


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(HEAD_BYTES)


def write_page(path: Path, html: str) -> None:
    """Write a page atomically.

    Raises:
        RunFileError: If the file cannot be written.
    """
    try:
        with whole.whole_file(path) as draft:
            draft.write_bytes(html.encode("utf-8", "replace"))
    except OSError as error:
        raise RunFileError(
            f"`--output` must be a file that can be written, got {path}: {error}"
        ) from error
