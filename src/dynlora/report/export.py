"""Write the tables of one or several runs as CSV, and their drawings as SVG and PNG."""

import csv
from pathlib import Path

from dynlora.errors import RunFileError
from dynlora.files.whole import remove, whole_folder
from dynlora.report import page, svg
from dynlora.report.comparison_page import compared, drawings, with_legend
from dynlora.report.pairs import Numbered, trade_off
from dynlora.report.tables import Table, comparison_tables, log_tables, main_metric, run_table

LIST = "files.txt"  # names of the files of an export, by which a later one knows it


def check_exportable(folder: Path) -> None:
    """Raise `RunFileError` if a path is neither free, nor an empty folder or earlier export."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    listed = folder / LIST
    if names and (
        not listed.is_file() or names != {LIST, *listed.read_text("utf-8", "replace").splitlines()}
    ):
        raise RunFileError(
            f"`--export` must be a new folder or an earlier export, got {folder}, which is "
            "neither: give another name."
        )


def export(runs: Numbered, folder: Path) -> None:
    """Write all tables and drawings into a folder, which replaces an earlier export."""
    tables = [run_table(runs), *log_tables(runs), *comparison_tables(runs).values()]
    points = trade_off(runs, main_metric(runs))
    if len(runs) > 1:
        drawn = {
            name: drawing
            if name.startswith("map")
            else with_legend(drawing, runs, [*points] if name == "front" else compared(runs))
            for name, drawing in drawings(runs).items()
        }
    else:
        drawn = page.drawings(*runs.values())
    with whole_folder(folder) as draft:
        for table in tables:
            if table.rows:
                _write_csv(table, draft / f"{table.name}.csv")
        for name, drawing in drawn.items():
            text = svg.svg_file(drawing)
            (draft / f"{name}.svg").write_bytes(text.encode("utf-8", "replace"))
            svg.write_png(drawing, draft / f"{name}.png")
        names = sorted(path.name for path in draft.iterdir())
        (draft / LIST).write_text("".join(f"{name}\n" for name in names))
        remove(folder)


def _write_csv(table: Table, path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        csv.writer(file).writerows([table.head, *table.rows])
