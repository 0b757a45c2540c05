"""`python -m benchmarks report`: write tables and figures from the records of studies."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.arguments import Parser, parse
from dynlora.cli.output import Output

PROGRAM = "python -m benchmarks report"
RESULTS = Path("benchmarks/results")
DOCUMENT = Path("runs/results.md")


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the command.

    Args:
        arguments: Words after `python -m benchmarks report` on the command line.
        output: Shows the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    given = parse(make_parser(), arguments)
    if given is None:
        return

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


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(PROGRAM, "Write tables and figures from the records of studies.")
    parser.add_argument(
        "results",
        metavar="RESULTS",
        type=Path,
        nargs="*",
        help=f"folder of results, or the .csv file of a study (default: {RESULTS})",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=DOCUMENT,
        help=f"Markdown file to write (default: {DOCUMENT})",
    )
    parser.add_argument(
        "--figures",
        metavar="FOLDER",
        type=Path,
        help="folder for the figures (default: the file's path without its ending)",
    )
    parser.add_argument(
        "--reference", metavar="METHOD", help="method that others are compared with (default: lora)"
    )
    return parser
