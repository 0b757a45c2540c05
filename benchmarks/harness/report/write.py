"""Step 8. Write the document and figures, replacing only an earlier report."""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from benchmarks.harness.report import style
from benchmarks.harness.report.document import MARK, Document
from dynlora.errors import RunFileError
from dynlora.files import whole

HEAD_BYTES = 2000
"""Length of the file's beginning that contains the mark."""
SHOWN = re.compile(r"\]\(([^()\s]+\.svg)\)")
"""Link to a figure in a report."""


def link_to(figures: Path, document: Path) -> str:
    """Return the relative path from a document to its figures' folder, as a link."""
    return quote(Path(os.path.relpath(figures, document.parent)).as_posix())


def check_places(document: Path, figures: Path) -> None:
    """Check that the paths are free or contain an earlier report.

    Raises:
        RunFileError: If the document is another file, or the figures' folder is a file or equals
            the document.
    """
    whole.check_file(document, RunFileError)
    if document.exists() and not _has(document, MARK):
        raise RunFileError(
            f"`--output` must be a new file or an earlier report, got {document}, which is "
            "neither: give another name."
        )
    if figures.resolve() == document.resolve():
        raise RunFileError(
            f"`--figures` must be another path than `--output`, got {figures} for both: give the "
            "document an ending such as .md, or `--figures`."
        )
    if figures.exists() and not figures.is_dir():
        raise RunFileError(
            f"`--figures` must be a folder, got {figures}, which is a file: give another name."
        )


def write_document(made: Document, document: Path, figures: Path) -> None:
    """Write a document and its figures, and remove obsolete figures of the earlier document.

    Raises:
        RunFileError: If a figure would replace a foreign file, or writing fails.
    """
    for drawing in made.drawings:
        path = figures / drawing.file
        if path.exists() and not (path.is_file() and _has(path, style.MARK)):
            raise RunFileError(
                f"{path} must be a figure of an earlier report, or not be there, got something "
                "else: move it, or give another `--figures`."
            )
    no_more = _left_over(made, document, figures)
    try:
        # Open the document first: if this fails, no figure is written.
        with whole.whole_file(document) as draft:
            draft.write_bytes(made.text.encode())
            for drawing in made.drawings:
                with whole.whole_file(figures / drawing.file) as drawn:
                    drawn.write_bytes(drawing.content)
        for path in no_more:
            path.unlink()
    except OSError as error:
        raise RunFileError(
            f"the report must be written to {document} and {figures}, which can be, got {error}: "
            "give other places."
        ) from error


def _left_over(made: Document, document: Path, figures: Path) -> list[Path]:
    """Return the figures linked in the existing document but not in the new one.

    Figures of other reports in the same folder are not included.
    """
    earlier = (_bytes(document) or b"").decode(errors="replace")
    shown = {(document.parent / unquote(link)).resolve() for link in SHOWN.findall(earlier)}
    wanted = {drawing.file for drawing in made.drawings}
    there = sorted(figures.glob("*.svg"))
    return [
        path
        for path in there
        if path.name not in wanted and path.resolve() in shown and _has(path, style.MARK)
    ]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _has(path: Path, mark: str) -> bool:
    with path.open("rb") as file:
        return mark.encode() in file.read(HEAD_BYTES)
