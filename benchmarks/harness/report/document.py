"""Step 7. Build the document: Markdown text and figures from studies."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.report.agreement import agreement_section
from benchmarks.harness.report.comparison import PairedComparison, compare
from benchmarks.harness.report.figures import Drawing, draw, stems
from benchmarks.harness.report.markdown import escape
from benchmarks.harness.report.results import StudyResults
from benchmarks.harness.report.sections import (
    cell_section,
    comparison_section,
    next_budget_section,
    runs_section,
    summary_section,
    tuning_section,
)
from dynlora.errors import ConfigError

DEFAULT_REFERENCE = "lora"
MARK = "<!-- Written by `python -m benchmarks report` from the records of runs; do not edit. -->"
HOW_TO_READ = """\
Tables show means and standard deviations over seeds. `runs` is the number of final runs in the
mean. `parameters` is the adapter's size at the end of training, `peak` its largest size. A run is
collapsed if it predicts the same class for all test rows. Collapsed runs are named and remain in
every mean. Runs with a non-finite loss or metric are named and excluded from every mean.

Differences are paired by seed: a method minus the reference. A pair is `lost` if one of its runs
has no finite result. With a lost pair no difference counts as shown, because the missing run may be
the worst. The interval is a BCa bootstrap of the mean (95 %, 10,000 resamples), given from six
pairs on. With ten normally distributed pairs its coverage is only about 90 %. The p-value is from a
permutation test of signs: exact up to 16 pairs, otherwise from 99,999 random patterns. Holm's rule
corrects it over all comparisons of a study in the same quantity: validation loss, validation
metric, test loss or test metric. There is no correction across studies, and none of intervals.
`better` and `worse` mean a corrected p-value of at most 0.05; `no difference shown` does not mean
that there is none. Methods are also compared, without a test, with the reference at the next higher
budget.

Seeds differ in the initial adapter, the initial head and the order of rows. Learning rate and scale
were tuned once per method and cell, on another seed. All runs share their training, validation and
test rows. So results are valid for these settings and rows. Settings were chosen by a validation
metric; test rows were not used.

In the summary a cell is a model, task and budget. `interval above` and `interval below` count the
cells whose interval excludes 0, on the side of a gain or of a loss. `mean gain` is the mean
difference over cells, with its sign such that more is better. The columns `over all cells` use one
pair per seed: its mean over cells, for seeds with a pair in every cell. These tests are corrected
over the methods of the study. A method may have runs in fewer cells than another.

In figures of means, bars are one standard deviation, and methods of one budget are drawn side by
side. In figures of differences, bars are 95 % intervals, and a filled marker is a significant
difference after the correction. Rank maps show mean final ranks over seeds: orange is above the
mean of all layers, violet below, and full colour means a factor of three."""


@dataclass(frozen=True, slots=True)
class Document:
    """Text, figures and comparisons to write."""

    text: str
    drawings: tuple[Drawing, ...]
    comparisons: dict[str, list[PairedComparison]]
    """By study."""


def make_document(studies: Sequence[StudyResults], reference: str | None, link: str) -> Document:
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


def _check_known(studies: Sequence[StudyResults], reference: str) -> None:
    known = sorted({method for study in studies for method in study.methods(first=reference)})
    if reference not in known:
        raise ConfigError(
            f"`--reference` must be a method of a final run, got {reference!r}: the records hold "
            f"{', '.join(known) or 'no final run'}."
        )


def _setting(
    study: StudyResults,
    setting: tuple[str, str],
    comparisons: Sequence[PairedComparison],
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
