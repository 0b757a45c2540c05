"""`python -m benchmarks report`: write tables and figures from the records of studies."""

from pathlib import Path
from typing import Any

import click

from dynlora.cli.arguments import FILE, FOLDER, Verb
from dynlora.cli.output import Output

RESULTS = Path("benchmarks/results")
DOCUMENT = Path("runs/results.md")


def run(given: Any, output: Output) -> None:
    """Run the command.

    Args:
        given: Parsed arguments.
        output: Shows the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    # Only now: these load matplotlib and scipy, and `--help` need not wait for them.
    from benchmarks.harness.report.document import make_document
    from benchmarks.harness.report.results import group, read_results
    from benchmarks.harness.report.view import make_table, make_values
    from benchmarks.harness.report.write import check_places, link_to, write_document

    document: Path = given.output
    figures: Path = given.figures or document.parent / document.stem
    check_places(document, figures)
    studies = group(read_results(given.results or [RESULTS]))
    made = make_document(studies, given.reference, link_to(figures, document))
    write_document(made, document, figures)
    paths = [str(figures / drawing.file) for drawing in made.drawings]
    output.show(
        make_table(studies, made, document),
        {"report": str(document), "figures": paths, "studies": make_values(studies, made)},
    )


COMMAND = Verb(
    "python -m benchmarks report",
    "tables and figures from the records of studies",
    run,
    [
        click.Argument(
            ["results"], type=FILE, metavar="RESULTS", nargs=-1,
            help=f"Folders of results, or .csv files of studies (default: {RESULTS}).",
        ),
        click.Option(
            ["--output"], type=FILE, metavar="FILE", default=DOCUMENT,
            help=f"Markdown file to write (default: {DOCUMENT}).",
        ),
        click.Option(
            ["--figures"], type=FOLDER, metavar="FOLDER",
            help="Folder for the figures (default: the file's path without its ending).",
        ),
        click.Option(
            ["--reference"], metavar="METHOD",
            help="Method that others are compared with (default: lora).",
        ),
    ],
)  # fmt: skip
