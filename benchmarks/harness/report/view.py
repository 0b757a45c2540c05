"""Output of `python -m benchmarks report`: one line per study; `--json` adds comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.harness.report.comparison import PairedComparison, Verdict
from benchmarks.harness.report.document import Document
from benchmarks.harness.report.results import StudyResults


def make_table(studies: Sequence[StudyResults], made: Document, document: Path) -> Table:
    """Return the number of runs and verdicts per study, as a table."""
    table = Table(title="report", caption=Text(str(document)))
    table.add_column("study", overflow="fold")
    for head in ("runs", "completed", *Verdict):
        table.add_column(str(head), justify="right")
    for study in studies:
        verdicts = [found.verdict for found in made.comparisons[study.name]]
        completed = sum(result.scores is not None for result in study.finals)
        counts = [len(study.finals), completed, *map(verdicts.count, Verdict)]
        table.add_row(Text(study.name), *map(str, counts))
    return table


def make_values(studies: Sequence[StudyResults], made: Document) -> dict[str, Any]:
    """Return the values for `--json`: counts of runs and all comparisons, by study."""
    return {
        study.name: {
            "runs": len(study.finals),
            "completed": sum(result.scores is not None for result in study.finals),
            "comparisons": [_comparison(found) for found in made.comparisons[study.name]],
        }
        for study in studies
    }


def _comparison(found: PairedComparison) -> Mapping[str, Any]:
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
