"""`dynlora bench report`: read the records of studies and write tables and figures about them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora.cli.arguments import VerbParser, new_parser, parse
from dynlora.cli.output import Output
from dynlora.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from dynlora.bench.report.comparison import Comparison
    from dynlora.bench.report.document import Document
    from dynlora.bench.report.study import Study

RESULTS = Path("benchmarks/results")
DOCUMENT = Path("docs/results.md")


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: What follows `bench report` on the command line.
        output: Where its words go.

    Raises:
        DynamicLoraError: If the input must be mended, or `--check` finds a difference.
    """
    given = parse(make_parser(), arguments)
    if given is None:
        return

    # Only now: these load matplotlib and scipy, and `--help` shall not wait for them.
    from dynlora.bench.report.document import make_document
    from dynlora.bench.report.folders import read_records
    from dynlora.bench.report.study import group
    from dynlora.bench.report.write import check_places, differences, link_to, write_document

    document: Path = given.output
    figures: Path = given.figures or document.with_suffix("")
    check_places(document, figures)
    studies = group(read_records(given.results or [RESULTS]))
    made = make_document(studies, given.reference, link_to(figures, document))
    if given.check:
        _check(differences(made, document, figures))
    else:
        write_document(made, document, figures)
    paths = [str(figures / drawing.file) for drawing in made.drawings]
    output.show(
        _table(studies, made, document),
        {"report": str(document), "figures": paths, "studies": _values(studies, made)},
    )


def make_parser() -> VerbParser:
    """Return the verb's parser."""
    parser = new_parser("bench report", "tables and figures from the records of studies")
    parser.add_argument(
        "results",
        metavar="RESULTS",
        type=Path,
        nargs="*",
        help=f"folder of a study's records, or of one folder a study (default: {RESULTS})",
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
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail if the files are not what the records give",
    )
    return parser


def _check(differing: Sequence[Path]) -> None:
    if differing:
        raise ConfigError(
            f"the report must be what its records give, got {len(differing)} files that are not: "
            f"{', '.join(map(str, differing))}: run `dynlora bench report` with the same options "
            "but without `--check`."
        )


def _table(studies: Sequence["Study"], made: "Document", document: Path) -> "Table":
    from rich.table import Table
    from rich.text import Text

    from dynlora.bench.report.comparison import Verdict

    table = Table(title="dynlora bench report", caption=Text(str(document)))
    table.add_column("study", overflow="fold")
    for head in ("runs", "completed", *Verdict):
        table.add_column(str(head), justify="right")
    for study in studies:
        verdicts = [found.verdict for found in made.comparisons[study.name]]
        completed = sum(run.outcome is not None for run in study.finals)
        counts = [len(study.finals), completed, *map(verdicts.count, Verdict)]
        table.add_row(Text(study.name), *map(str, counts))
    return table


def _values(studies: Sequence["Study"], made: "Document") -> dict[str, Any]:
    return {
        study.name: {
            "runs": len(study.finals),
            "completed": sum(run.outcome is not None for run in study.finals),
            "comparisons": [_comparison(found) for found in made.comparisons[study.name]],
        }
        for study in studies
    }


def _comparison(found: "Comparison") -> Mapping[str, Any]:
    return {
        "model": found.cell.model,
        "task": found.cell.task,
        "budget": found.cell.budget,
        "method": found.method,
        "quantity": str(found.quantity),
        "metric": found.metric,
        "pairs": len(found.differences),
        "difference": found.mean,
        "interval": found.interval,
        "p": found.p,
        "corrected": found.corrected,
        "verdict": str(found.verdict),
    }
