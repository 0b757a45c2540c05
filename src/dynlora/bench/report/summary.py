"""Section: each study in one table: how often a method is better, worse, or not told apart."""

from collections.abc import Sequence

from dynlora.bench.report.comparison import LEVEL, Comparison, Quantity, Verdict
from dynlora.bench.report.markdown import escape, table
from dynlora.bench.report.numbers import interval_text, p_text, signed_text
from dynlora.bench.report.overall import Standing, standings
from dynlora.bench.report.statistics import least_p


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
    """Say where the correction leaves no p-value that could count, whatever the runs had shown."""
    lines = []
    for quantity in Quantity:
        tested = [c for c in comparisons if c.quantity is quantity and c.p is not None]
        pairs = max((len(found.differences) for found in tested), default=1)
        least = min(1.0, least_p(pairs) * len(tested))
        if least > LEVEL:
            lines.append(
                f"- In {quantity}, no difference in a single cell can be shown: {len(tested)} "
                f"comparisons of at most {pairs} pairs leave no corrected p-value below "
                f"{least:.2g}."
            )
    return [*lines, ""] if lines else []
