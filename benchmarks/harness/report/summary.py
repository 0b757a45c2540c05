"""Section: per study, a table of how often each method is better, worse or open."""

from collections.abc import Sequence

from benchmarks.harness.report.comparison import LEVEL, Comparison, Quantity, Verdict
from benchmarks.harness.report.markdown import escape, table
from benchmarks.harness.report.numbers import interval_text, p_text, signed_text
from benchmarks.harness.report.overall import Standing, standings
from benchmarks.harness.report.statistics import holm, least_p


def summary_section(comparisons: Sequence[Comparison], reference: str) -> list[str]:
    """Return the summary of a study's comparisons."""
    if not comparisons:
        return [f"No run of {escape(reference)} to compare others with.", ""]
    head = [
        f"against {escape(reference)}", "in", "cells", "better", "worse", "no difference shown",
        "interval above", "interval below", "mean gain", "95 % interval", "seeds", "p, corrected",
        "over all cells",
    ]  # fmt: skip
    rows = map(_row, standings(comparisons))
    return [*table(head, rows, words=2), *_out_of_reach(comparisons)]


def _row(found: Standing) -> list[str]:
    return [
        escape(found.method),
        str(found.quantity),
        str(len(found.verdicts)),
        *(str(found.verdicts.count(verdict)) for verdict in Verdict),
        str(found.intervals.count(Verdict.BETTER)),
        str(found.intervals.count(Verdict.WORSE)),
        "–" if found.gain is None else signed_text(found.gain),
        interval_text(found.interval),
        str(len(found.means)),
        p_text(found.corrected),
        str(found.verdict),
    ]


def _out_of_reach(comparisons: Sequence[Comparison]) -> list[str]:
    """Report the number of comparisons that cannot become significant after the correction."""
    alike: dict[tuple[int, int], list[str]] = {}
    for quantity in Quantity:
        tested = [c for c in comparisons if c.quantity is quantity and c.p is not None]
        least = holm([least_p(len(found.differences)) for found in tested])
        if out := sum(p > LEVEL for p in least):
            alike.setdefault((out, len(tested)), []).append(str(quantity))
    lines = [
        f"- Too few pairs for any difference to be shown after the correction: {out} of {count} "
        f"comparisons in {', '.join(quantities)}."
        for (out, count), quantities in alike.items()
    ]
    return [*lines, ""] if lines else []
