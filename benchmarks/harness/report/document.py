"""Step 7. Build the document: Markdown text and figures from studies."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.report.cell_tables import cell_section, comparison_section
from benchmarks.harness.report.comparison import Comparison, compare
from benchmarks.harness.report.figures import Drawing, draw, stems
from benchmarks.harness.report.markdown import escape
from benchmarks.harness.report.next_budget import next_budget_section
from benchmarks.harness.report.rank_tables import agreement_section
from benchmarks.harness.report.run_tables import runs_section, tuning_section
from benchmarks.harness.report.study import Study
from benchmarks.harness.report.summary import summary_section
from dynlora.errors import ConfigError

DEFAULT_REFERENCE = "lora"
MARK = "<!-- Written by `python -m benchmarks report` from the records of runs; do not edit. -->"
HOW_TO_READ = """\
Means are given with the standard deviation over seeds. `runs` is how many of the final runs are
in them. `parameters` are those of the adapter at the end of training, `peak` the most it ever
held. Collapsed runs, whose guesses on the test rows are all one class, are counted and named, and
stay in every mean; runs whose loss or metric is not finite are named and in none.

Differences are paired: a method minus the reference, over the seeds that both have. A pair is
`lost` if one of both runs has no finite result: the difference then leaves out what may be the
worst of them, and shows nothing. The interval is a BCa bootstrap of the mean (95 %, 10,000
resamples), given from six pairs on; it is narrow: of normal differences it holds the mean in about
90 % of studies with ten pairs. The p-value is that of a permutation test of signs: exact up to 16
pairs, from 100,000 random patterns beyond. It is corrected by Holm's rule over all comparisons
that a study makes in validation loss, in the validation metric, in test loss, and in the test
metric, each for itself; studies are not corrected against each other. `better` and `worse` mean
that the corrected p-value is at most 0.05; `no difference shown` does not mean that there is none.
Intervals are not corrected. Where the reference was run at several budgets, methods are also set
against it at the next higher one, by the same seeds; these differences are not tested.

Seeds differ in the adapter's start, the head's, and the order of rows. The learning rate and scale
of a cell were tuned once, on another seed, and training, validation and test rows are the same for
all: what is shown is shown of these settings and rows. Validation loss is also what the settings
were chosen by; test rows were not used.

In the summary a cell is a model, task and budget, and the counts are of cells; `interval above`
and `interval below` count those whose interval excludes 0, on the side of a gain or of a loss.
`mean gain` is the mean over cells of the difference, with the sign turned where lower is better,
so that more is always better. With its interval, p-value and verdict `over all cells` it takes each
seed's mean over cells as one pair, of the seeds that have a pair in every cell (without one, it is
over what each cell has); they are corrected over the methods of the study. A method's cells are
those where it was run, and may be fewer than another's.

In the figures, bars around means are one standard deviation, and methods of one budget are moved
apart sideways; bars around differences are 95 % intervals (none below six pairs), and a full
marker is a difference shown after the correction. Rank maps give the mean final rank over seeds:
orange is above the mean of all layers, violet below, and the full colour three times as much or as
little."""


@dataclass(frozen=True, slots=True)
class Document:
    """Text, figures and comparisons to write."""

    text: str
    drawings: tuple[Drawing, ...]
    comparisons: dict[str, list[Comparison]]
    """By study."""


def make_document(studies: Sequence[Study], reference: str | None, link: str) -> Document:
    """Build the document on all studies.

    Args:
        studies: At least one.
        reference: Method to compare others with; None uses `lora`.
        link: Path of the figures' folder relative to the document, with forward slashes.

    Raises:
        ConfigError: If `reference` has no final run in any study.
    """
    chosen = reference or DEFAULT_REFERENCE
    if reference:
        _check_known(studies, reference)
    names = stems(studies)
    comparisons = {study.name: compare(study, chosen) for study in studies}
    lines = [MARK, "", "# Results", "", HOW_TO_READ, "", "## Summary", ""]
    for study in studies:
        summary = summary_section(comparisons[study.name], chosen)
        lines += [f"### Summary of {escape(study.name)}", "", *summary]
    drawings: list[Drawing] = []
    for study in studies:
        lines += [f"## {escape(study.name)}", ""]
        lines += [line for text in study.descriptions for line in (text, "")]
        lines += ["### Runs", "", *runs_section(study, chosen)]
        for setting in study.settings:
            ours = [c for c in comparisons[study.name] if (c.cell.model, c.cell.task) == setting]
            drawn = draw(study, setting, ours, chosen, names[study.name, setting])
            lines += _setting(study, setting, ours, chosen, drawn, link)
            drawings += drawn
    return Document("\n".join(lines).rstrip() + "\n", tuple(drawings), comparisons)


def _check_known(studies: Sequence[Study], reference: str) -> None:
    known = sorted({method for study in studies for method in study.methods(first=reference)})
    if reference not in known:
        raise ConfigError(
            f"`--reference` must be a method of a final run, got {reference!r}: the records hold "
            f"{', '.join(known) or 'no final run'}."
        )


def _setting(
    study: Study,
    setting: tuple[str, str],
    comparisons: Sequence[Comparison],
    reference: str,
    drawings: Sequence[Drawing],
    link: str,
) -> list[str]:
    """Return the section on one model and task."""
    model, task = map(escape, setting)
    lines = [f"### {task} with {model}", ""]
    lines += tuning_section(study, setting, reference)
    for cell in study.budgets(setting):
        lines += [f"#### {task} with {model}, budget {cell.budget:,}", ""]
        lines += cell_section(study, cell, reference)
        lines += comparison_section([c for c in comparisons if c.cell == cell], reference)
    lines += next_budget_section(study, setting, reference)
    lines += agreement_section(study, setting, reference)
    for drawing in drawings:
        lines += [f"![{escape(drawing.caption)}]({link}/{drawing.file})", ""]
    return lines
