"""Put a page on disk: whole or not at all, and over nothing but an earlier page."""

from pathlib import Path

from dynlora.errors import RunFileError
from dynlora.report.page import MARK

HEAD_BYTES = 1000
"""Where the mark of a page of ours stands at the latest."""


def check_replaceable(path: Path) -> None:
    """Leave files alone that are not reports.

    Raises:
        RunFileError: If something else than an earlier report is there.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise RunFileError(
            f"`--output` must be a file, got {path}, which is a folder: give a file in it, such as "
            f"{path / 'report.html'}."
        )
    with path.open("rb") as file:
        ours = MARK.encode() in file.read(HEAD_BYTES)
    if not ours:
        raise RunFileError(
            f"`--output` must be a new file or an earlier report, got {path}, which is neither: "
            "give another name."
        )


def write_page(path: Path, html: str) -> None:
    """Write a page so that readers see the old one or the new, never a part.

    Raises:
        RunFileError: If the file cannot be written.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(html.encode("utf-8", "replace"))
        draft.replace(path)
    except OSError as error:
        raise RunFileError(
            f"`--output` must be a file that can be written, got {path}: {error}"
        ) from error
