"""Put a page on disk: whole or not at all, and over nothing but an earlier page."""

from pathlib import Path

from dynlora.errors import RunFileError
from dynlora.files import whole
from dynlora.report.page import MARK

HEAD_BYTES = 1000
"""Where the mark of a page of ours stands at the latest."""


def check_replaceable(path: Path) -> None:
    """Leave files alone that are not reports.

    Raises:
        RunFileError: If something else than an earlier report is there.
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
    """Write a page so that readers see the old one or the new, never a part.

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
