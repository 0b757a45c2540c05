"""Section: each method compared with the reference at the next higher budget."""

from statistics import fmean

from benchmarks.harness.report.cell_tables import name_of
from benchmarks.harness.report.comparison import (
    INTERVAL_PAIRS,
    Quantity,
    differences_by_seed,
    lost_pairs,
    metric_of,
    pairs_text,
)
from benchmarks.harness.report.markdown import escape, table
from benchmarks.harness.report.numbers import interval_text, signed_text
from benchmarks.harness.report.record import Cell
from benchmarks.harness.report.statistics import bootstrap_interval
from benchmarks.harness.report.study import Study
from dynlora.report.wording import lower_is_better


def next_budget_section(study: Study, setting: tuple[str, str], reference: str) -> list[str]:
    """Return each method compared with the reference at its next higher budget.

    Empty if no seed has both runs.
    """
    cells = study.budgets(setting)
    rows = [
        row
        for method in study.methods(first=reference)[1:]
        for cell in cells
        if (higher := _next(study, cells, cell, reference))
        for quantity in Quantity
        if (row := _row(study, cell, method, higher, reference, quantity))
    ]
    if not rows:
        return []
    lead = (
        f"Against {escape(reference)} at the next higher budget, without a test: what rank a "
        "method is worth."
    )
    head = [
        "method", "in", "better is", "budget", f"against {escape(reference)} at", "pairs",
        "difference", "95 % interval", "pairs better",
    ]  # fmt: skip
    return [lead, "", *table(head, rows, words=3)]


def _next(study: Study, cells: list[Cell], cell: Cell, reference: str) -> Cell | None:
    higher = [c for c in cells if c.budget > cell.budget and study.usable(c, reference)]
    return min(higher, key=lambda c: c.budget, default=None)


def _row(
    study: Study, cell: Cell, method: str, higher: Cell, reference: str, quantity: Quantity
) -> list[str]:
    ours, theirs = study.usable(cell, method), study.usable(higher, reference)
    values = list(differences_by_seed(ours, theirs, quantity).values())
    if not values:
        return []
    metric = metric_of(study, (cell.model, cell.task), quantity)
    interval = bootstrap_interval(values) if len(values) >= INTERVAL_PAIRS else None
    better = sum(value < 0 if lower_is_better(metric) else value > 0 for value in values)
    return [
        escape(method),
        escape(name_of(quantity, metric)),
        "lower" if lower_is_better(metric) else "higher",
        f"{cell.budget:,}",
        f"{higher.budget:,}",
        pairs_text(len(values), lost_pairs(study, (cell, method), (higher, reference))),
        signed_text(fmean(values)),
        interval_text(interval),
        str(better),
    ]
