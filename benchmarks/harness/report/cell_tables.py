"""Section: results of each method for one model, task and budget, and differences between them."""

from collections.abc import Sequence
from statistics import fmean

from benchmarks.harness.report.comparison import Comparison, Quantity, pairs_text, value_of
from benchmarks.harness.report.markdown import escape, seeds_text, table
from benchmarks.harness.report.numbers import interval_text, p_text, signed_text, spread_text
from benchmarks.harness.report.record import Cell, Outcome
from benchmarks.harness.report.study import Study
from dynlora.report.wording import count_text, lower_is_better

COSTS = ("parameters", "peak")


def cell_section(study: Study, cell: Cell, reference: str) -> list[str]:
    """Return the table of methods, and remarks on collapsed and non-finite runs."""
    metric = study.metric((cell.model, cell.task))
    methods = [m for m in study.methods(first=reference) if study.runs(cell, m)]
    found = {method: list(study.usable(cell, method).values()) for method in methods}
    everything = [outcome for outcomes in found.values() for outcome in outcomes]
    shown = [q for q in Quantity if q is Quantity.LOSS or _values(everything, q)]
    head = ["method", "runs", *(escape(name_of(q, metric)) for q in shown), *COSTS, "collapsed"]
    rows = [
        [
            escape(method),
            f"{len(outcomes)} of {len(study.runs(cell, method))}",
            *(spread_text(_values(outcomes, quantity)) for quantity in shown),
            *_costs(outcomes),
            _collapsed_text(study, cell, method),
        ]
        for method, outcomes in found.items()
    ]
    return [*table(head, rows), *_remarks(study, cell, methods)]


def name_of(quantity: Quantity, metric: str) -> str:
    """Return the name of a quantity for a task's main metric."""
    match quantity:
        case Quantity.LOSS:
            return "validation loss"
        case Quantity.METRIC:
            return f"validation {metric}"
        case Quantity.TEST_LOSS:
            return "test loss"
        case Quantity.TEST:
            return f"test {metric}"


def _values(outcomes: Sequence[Outcome], quantity: Quantity) -> list[float]:
    return [v for o in outcomes if (v := value_of(o, quantity)) is not None]


def _costs(outcomes: Sequence[Outcome]) -> list[str]:
    """Return mean parameters; dashes without runs."""
    if not outcomes:
        return ["–"] * len(COSTS)
    return [
        count_text(fmean(outcome.live for outcome in outcomes)),
        count_text(fmean(outcome.peak for outcome in outcomes)),
    ]


def _collapsed(study: Study, cell: Cell, method: str) -> list[int]:
    runs = study.runs(cell, method)
    return [run.seed for run in runs if run.outcome and run.outcome.collapsed]


def _collapsed_text(study: Study, cell: Cell, method: str) -> str:
    """Return the number of collapsed runs; a dash if unknown."""
    runs = study.runs(cell, method)
    known = [run for run in runs if run.outcome and run.outcome.collapsed is not None]
    return str(len(_collapsed(study, cell, method))) if known else "–"


def _remarks(study: Study, cell: Cell, methods: Sequence[str]) -> list[str]:
    """List collapsed runs and runs excluded from means."""
    lines = []
    for method in methods:
        if seeds := _collapsed(study, cell, method):
            lines.append(f"- Collapsed to one class: {escape(method)}, {seeds_text(seeds)}.")
        if seeds := study.not_finite(cell, method):
            lines.append(
                f"- Completed with a loss or metric that is not finite, and left out: "
                f"{escape(method)}, {seeds_text(seeds)}."
            )
    return [*lines, ""] if lines else []


def comparison_section(comparisons: Sequence[Comparison], reference: str) -> list[str]:
    """Return the table of differences from the reference in one cell; empty without comparisons."""
    if not comparisons:
        return []
    head = [
        f"against {escape(reference)}", "in", "better is", "pairs", "difference", "95 % interval",
        "p", "p, corrected", "verdict",
    ]  # fmt: skip
    rows = [
        [
            escape(found.method),
            escape(name_of(found.quantity, found.metric)),
            "lower" if lower_is_better(found.metric) else "higher",
            pairs_text(len(found.differences), found.lost),
            signed_text(found.mean),
            interval_text(found.interval),
            p_text(found.p),
            p_text(found.corrected),
            str(found.verdict),
        ]
        for found in comparisons
    ]
    return table(head, rows, words=3)
