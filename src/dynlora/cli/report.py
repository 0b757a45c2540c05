"""`dynlora report RUN...`: write an HTML page about one or several runs; export its contents."""

from pathlib import Path
from typing import Any

from dynlora.cli.arguments import FILE, FOLDER, RUNS, Verb, option
from dynlora.cli.output import Output, note


def _run(given: Any, output: Output) -> None:
    from dynlora.report.comparison_page import comparison_page
    from dynlora.report.export import check_exportable, export
    from dynlora.report.page import check_replaceable, report_page, write_page
    from dynlora.report.results import fact_table
    from dynlora.runs.reader import read_run

    several = len(given.runs) > 1
    path = given.output or (Path("comparison.html") if several else given.runs[0] / "report.html")
    check_replaceable(path)
    if given.export is not None:
        check_exportable(given.export, path)
    runs = dict(enumerate(map(read_run, given.runs), start=1))
    html = comparison_page(runs) if several else report_page(runs[1])
    if given.export is not None:
        export(runs, given.export)  # before the page, which may be in its folder
    write_page(path, html)
    notes = [
        f"run {n}: {text}" if several else text for n, run in runs.items() for text in run.notes
    ]
    for text in notes:
        note(output.progress, text)
    size = path.stat().st_size
    statuses = ", ".join(dict.fromkeys(run.status for run in runs.values()))
    methods = ", ".join(dict.fromkeys(run.method for run in runs.values()))
    facts = {
        f"{len(runs)} runs" if several else "run": f"{methods}, {statuses}",
        "report": str(path),
        "size": f"{size / 1000:.0f} kB",
    }
    values = {"report": str(path), "bytes": size, "status": statuses, "notes": notes}
    if given.export is not None:
        facts["export"] = values["export"] = str(given.export)
    output.show(fact_table("dynlora report", facts.items()), values)


COMMAND = Verb(
    "report",
    "one HTML page about a run, or comparing several; CSV, SVG, PNG",
    _run,
    [
        RUNS,
        option(
            "--output FILE",
            "File to write (default: RUN/report.html; of several runs comparison.html).",
            FILE,
        ),
        option(
            "--export DIR",
            "A new folder for the tables as CSV and the drawings as SVG and PNG.",
            FOLDER,
        ),
    ],
)
