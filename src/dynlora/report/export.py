"""Write the tables of one or several runs as CSV, and their drawings as SVG and PNG."""

import csv
from pathlib import Path

from dynlora.errors import RunFileError
from dynlora.files.whole import remove, whole_folder
from dynlora.report import comparison_page, page, svg
from dynlora.report.tables import Numbered, tables_of

LIST = "files.txt"  # names of all files, by which a later export knows the folder


def check_exportable(folder: Path, page: Path) -> None:
    """Raise `RunFileError` if a path is neither free, nor an empty folder or earlier export.

    The folder may contain the report's `page`.
    """
    if folder.name in ("", ".."):  # the draft is a sibling, renamed at the end
        raise RunFileError(f"`--export` must be the name of a folder, but got {folder}.")
    if page.resolve() == folder.resolve():
        raise RunFileError(f"`--output` must be a file, but got {page}, the folder of `--export`.")
    if not folder.exists():
        return
    names, known = {path.name for path in folder.iterdir()}, set()
    if (folder / LIST).is_file():
        known = {LIST, *(folder / LIST).read_text("utf-8", "replace").splitlines()}
    if page.resolve().parent == folder.resolve():
        names -= {page.name}
    if names and names != known:
        raise RunFileError(
            f"`--export` must be a new folder or an earlier export, got {folder}, which is "
            "neither: give another name."
        )


def export(runs: Numbered, folder: Path) -> None:
    """Write all tables and drawings into a folder, which replaces an earlier export."""
    several = len(runs) > 1
    folder = folder.resolve()  # a link stays, and its target is replaced
    drawn = comparison_page.drawings(runs) if several else page.drawings(*runs.values())
    with whole_folder(folder) as draft:
        for name, table in tables_of(runs).items():
            path = draft / f"{name}.csv"
            with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
                csv.writer(file).writerows([table.head, *table.rows])
        for name, drawing in drawn.items():
            text = svg.svg_file(drawing)
            (draft / f"{name}.svg").write_bytes(text.encode("utf-8", "replace"))
            svg.write_png(drawing, draft / f"{name}.png")
        (draft / LIST).write_text("\n".join(sorted(path.name for path in draft.iterdir())))
        remove(folder)
