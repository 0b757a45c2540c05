"""`dynlora report RUN`: write an HTML report about a run."""

from collections.abc import Sequence
from pathlib import Path

from dynlora.cli.arguments import VerbParser, parse, verb_parser
from dynlora.cli.output import Output


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: Words after `report` on the command line.
        output: Shows notes and the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    given = parse(make_parser(), arguments)
    if given is None:
        return

    # Only now: these load torch, and `--help` need not wait for it.
    from rich.table import Table
    from rich.text import Text

    from dynlora.report.page import report_page
    from dynlora.report.write_page import check_replaceable, write_page
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


def make_parser() -> VerbParser:
    """Return the verb's parser."""
    parser = verb_parser("report")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder that `dynlora train` wrote")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="file to write (default: RUN/report.html)"
    )
    return parser
