"""`dynlora report RUN`: write an HTML report about a run."""

from typing import Any

import click

from dynlora.cli.arguments import FILE, FOLDER, Verb
from dynlora.cli.output import Output


def run(given: Any, output: Output) -> None:
    """Run the verb.

    Args:
        given: Parsed arguments.
        output: Shows notes and the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    # Only now: these load torch, and `--help` need not wait for it.
    from rich.table import Table
    from rich.text import Text

    from dynlora.report.page import check_replaceable, report_page, write_page
    from dynlora.runs.reader import read_run

    path = given.output or given.run / "report.html"
    check_replaceable(path)
    found = read_run(given.run)
    write_page(path, report_page(found))
    for note in found.notes:
        output.progress.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    table = Table(title="dynlora report", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    size = path.stat().st_size
    for label, text in (
        ("run", f"{found.method}, {found.status}"),
        ("report", str(path)),
        ("size", f"{size / 1000:.0f} kB"),
    ):
        table.add_row(label, Text(text))
    values = {"report": str(path), "bytes": size, "status": found.status, "notes": [*found.notes]}
    output.show(table, values)


COMMAND = Verb(
    "report",
    "one HTML file about a run: ranks, diagram, losses, events",
    run,
    [
        click.Argument(
            ["run"], type=FOLDER, metavar="RUN", help="Folder of a `dynlora train` run."
        ),
        click.Option(
            ["--output"],
            type=FILE,
            metavar="FILE",
            help="File to write (default: RUN/report.html).",
        ),
    ],
)
