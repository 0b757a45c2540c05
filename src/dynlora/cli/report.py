"""`dynlora report RUN`: write an HTML report about a run."""

from typing import Any

import click

from dynlora.cli.arguments import FILE, RUN, Verb
from dynlora.cli.output import Output, note


def _run(given: Any, output: Output) -> None:
    from dynlora.report.page import check_replaceable, report_page, write_page
    from dynlora.report.results import fact_table
    from dynlora.runs.reader import read_run

    path = given.output or given.run / "report.html"
    check_replaceable(path)
    found = read_run(given.run)
    write_page(path, report_page(found))
    for text in found.notes:
        note(output.progress, text)
    size = path.stat().st_size
    facts = {
        "run": f"{found.method}, {found.status}",
        "report": str(path),
        "size": f"{size / 1000:.0f} kB",
    }
    values = {"report": str(path), "bytes": size, "status": found.status, "notes": [*found.notes]}
    output.show(fact_table("dynlora report", facts.items()), values)


COMMAND = Verb(
    "report",
    "one HTML file about a run: ranks, diagram, losses, events",
    _run,
    [
        RUN,
        click.Option(
            ["--output"],
            type=FILE,
            metavar="FILE",
            help="File to write (default: RUN/report.html).",
        ),
    ],
)
