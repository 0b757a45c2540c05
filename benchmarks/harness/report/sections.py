"""Sections of the document in Markdown: summary, runs, tuning, cells, next higher budget."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from benchmarks.harness.report.comparison import (
    INTERVAL_PAIRS,
    LEVEL,
    PairedComparison,
    Quantity,
    Standing,
    Verdict,
    differences_by_seed,
    lost_pairs,
    metric_of,
    pairs_text,
    standings,
    value_of,
)
from benchmarks.harness.report.markdown import (
    error_text,
    escape,
    interval_text,
    p_text,
    seeds_text,
    setting_text,
    signed_text,
    spread_text,
    table,
)
from benchmarks.harness.report.results import STATUSES, Cell, Result, Scores, StudyResults
from benchmarks.harness.report.statistics import bootstrap_interval, holm, least_p
from dynlora.report.wording import count_text, lower_is_better

COSTS = ("parameters", "peak")
"""Columns of the adapter size in the table of a cell."""


def summary_section(comparisons: Sequence[PairedComparison], reference: str) -> list[str]:
    """Return the summary of a study's comparisons."""
    if not comparisons:
        return [f"No run of {escape(reference)} to compare others with.", ""]
    head = [
        f"against {escape(reference)}", "in", "cells", "better", "worse", "no difference shown",
        "interval above", "interval below", "mean gain", "95 % interval", "seeds", "p, corrected",
        "over all cells",
    ]  # fmt: skip
    rows = map(_summary_row, standings(comparisons))
    return [*table(head, rows, words=2), *_out_of_reach(comparisons)]


def _summary_row(found: Standing) -> list[str]:
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


def _out_of_reach(comparisons: Sequence[PairedComparison]) -> list[str]:
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


def runs_section(study: StudyResults, reference: str) -> list[str]:
    """Return counts by status, then a list of incomplete runs with their errors."""
    methods = sorted(
        {r.run.method for r in study.results}, key=lambda name: (name != reference, name)
    )
    statuses = [s for s in STATUSES if any(result.run.status == s for result in study.results)]
    trials = [result for result in study.results if result.run.kind == "trial"]
    head = ["method", *(s.replace("_", " ") for s in statuses), *(["trials"] if trials else [])]
    rows = []
    for method in methods:
        counts = Counter[str](r.run.status for r in study.finals if r.run.method == method)
        tried = [str(sum(trial.run.method == method for trial in trials))] if trials else []
        rows.append([escape(method), *(str(counts[status]) for status in statuses), *tried])
    return [*table(head, rows), *_not_completed(study)]


def _not_completed(study: StudyResults) -> list[str]:
    """Return a line per reason, shared by runs that differ only in their seed."""
    reasons: dict[tuple[str, str, Cell, str, str], list[int]] = {}
    for result in study.results:
        run = result.run
        if run.status != "completed":
            status = run.status.replace("_", " ") + (" (diverged)" if run.diverged else "")
            key = run.kind, run.method, result.cell, status, run.error
            reasons.setdefault(key, []).append(run.seed)
    if not reasons:
        return []
    lines = [
        f"- {'a trial of ' if kind == 'trial' else ''}{escape(method)}, {cell_text(cell)}, "
        f"{seeds_text(seeds)}: {status}{': ' if error else ''}{error_text(error)}"
        for (kind, method, cell, status, error), seeds in reasons.items()
    ]
    return ["Not completed:", "", *lines, ""]


def cell_text(cell: Cell) -> str:
    """Format model, task and budget."""
    return f"{escape(cell.model)}, {escape(cell.task)}, budget {cell.budget:,}"


def tuning_section(study: StudyResults, setting: tuple[str, str], reference: str) -> list[str]:
    """Return the tuned settings per method and budget of a model and task, if any."""
    cells, rows = study.budgets(setting), []
    for method in study.methods(first=reference):
        texts = [_tuning(study, cell, method) for cell in cells]
        if any(texts):
            rows.append([escape(method), *(text or "–" for text in texts)])
    if not rows:
        return []
    head = ["method", *(f"budget {cell.budget:,}" for cell in cells)]
    lead = (
        "Tuned on validation data: learning rate, scale, and trials to find them; ↑ and ↓ are the "
        "highest and the lowest value that was tried."
    )
    return [lead, "", *table(head, rows)]


def _tuning(study: StudyResults, cell: Cell, method: str) -> str:
    """Return a cell of the table; empty without tuning."""
    chosen = list(dict.fromkeys(run.tuned for run in study.runs(cell, method) if run.tuned))
    tried = [r.tuned for r in _trials_of(study, cell, method) if r.tuned]
    rates, scales = [c.learning_rate for c in tried], [c.scale for c in tried]
    pairs = [
        f"{setting_text(c.learning_rate)}{_edge(c.learning_rate, rates)}, "
        f"{setting_text(c.scale)}{_edge(c.scale, scales)}"
        for c in chosen
    ]
    trials = _trials(study, cell, method)
    return f"{' or '.join(pairs) or 'nothing yet'}, {trials}" if chosen or trials != "0" else ""


def _trials(study: StudyResults, cell: Cell, method: str) -> str:
    """Return the number of trials, and how many of them completed if not all."""
    found = _trials_of(study, cell, method)
    completed = sum(trial.run.status == "completed" for trial in found)
    return str(completed) if completed == len(found) else f"{completed} of {len(found)}"


def _trials_of(study: StudyResults, cell: Cell, method: str) -> Sequence[Result]:
    trials = [result for result in study.results if result.run.kind == "trial"]
    return [trial for trial in trials if (trial.cell, trial.run.method) == (cell, method)]


def _edge(value: float, tried: Sequence[float]) -> str:
    """Return an arrow if a value is the highest or lowest of several."""
    if len(set(tried)) < 2:
        return ""
    return {max(tried): "↑", min(tried): "↓"}.get(value, "")


def cell_section(study: StudyResults, cell: Cell, reference: str) -> list[str]:
    """Return the table of methods, and remarks on collapsed and non-finite runs."""
    metric = study.metric((cell.model, cell.task))
    methods = [m for m in study.methods(first=reference) if study.runs(cell, m)]
    found = {method: list(study.usable(cell, method).values()) for method in methods}
    everything = [run for runs in found.values() for run in runs]
    shown = [q for q in Quantity if q is Quantity.LOSS or _values(everything, q)]
    head = ["method", "runs", *(escape(name_of(q, metric)) for q in shown), *COSTS, "collapsed"]
    rows = [
        [
            escape(method),
            f"{len(runs)} of {len(study.runs(cell, method))}",
            *(spread_text(_values(runs, quantity)) for quantity in shown),
            *_costs(runs),
            _collapsed_text(study, cell, method),
        ]
        for method, runs in found.items()
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


def _values(runs: Sequence[Scores], quantity: Quantity) -> list[float]:
    return [value for run in runs if (value := value_of(run, quantity)) is not None]


def _costs(runs: Sequence[Scores]) -> list[str]:
    """Return mean parameters; dashes without runs."""
    if not runs:
        return ["–"] * len(COSTS)
    return [
        count_text(fmean(run.parameters.end for run in runs)),
        count_text(fmean(run.parameters.peak for run in runs)),
    ]


def _collapsed(study: StudyResults, cell: Cell, method: str) -> list[int]:
    runs = study.runs(cell, method)
    return [r.run.seed for r in runs if r.scores and r.scores.collapsed]


def _collapsed_text(study: StudyResults, cell: Cell, method: str) -> str:
    """Return the number of collapsed runs; a dash if unknown."""
    runs = study.runs(cell, method)
    known = any(r.scores and r.scores.collapsed is not None for r in runs)
    return str(len(_collapsed(study, cell, method))) if known else "–"


def _remarks(study: StudyResults, cell: Cell, methods: Sequence[str]) -> list[str]:
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


def comparison_section(comparisons: Sequence[PairedComparison], reference: str) -> list[str]:
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


def next_budget_section(study: StudyResults, setting: tuple[str, str], reference: str) -> list[str]:
    """Return each method compared with the reference at its next higher budget.

    Empty if no seed has both runs.
    """
    cells = study.budgets(setting)
    rows = [
        row
        for method in study.methods(first=reference)[1:]
        for cell in cells
        if (higher := _next_budget(study, cells, cell, reference))
        for quantity in Quantity
        if (row := _next_budget_row(study, cell, method, higher, reference, quantity))
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


def _next_budget(study: StudyResults, cells: list[Cell], cell: Cell, reference: str) -> Cell | None:
    higher = [c for c in cells if c.budget > cell.budget and study.usable(c, reference)]
    return min(higher, key=lambda c: c.budget, default=None)


def _next_budget_row(
    study: StudyResults, cell: Cell, method: str, higher: Cell, reference: str, quantity: Quantity
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
