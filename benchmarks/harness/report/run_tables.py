"""Section: status of the runs, and settings chosen by tuning."""

from collections import Counter
from collections.abc import Sequence

from benchmarks.harness.report.markdown import error_text, escape, seeds_text, table
from benchmarks.harness.report.numbers import setting_text
from benchmarks.harness.report.record import STATUSES, Cell, Record
from benchmarks.harness.report.study import Study


def runs_section(study: Study, reference: str) -> list[str]:
    """Return counts by status, then a list of incomplete runs with their errors."""
    methods = sorted({r.method for r in study.records}, key=lambda name: (name != reference, name))
    statuses = [s for s in STATUSES if any(record.status == s for record in study.records)]
    trials = [record for record in study.records if record.kind == "trial"]
    head = ["method", *(s.replace("_", " ") for s in statuses), *(["trials"] if trials else [])]
    rows = []
    for method in methods:
        counts = Counter(run.status for run in study.finals if run.method == method)
        tried = [str(sum(trial.method == method for trial in trials))] if trials else []
        rows.append([escape(method), *(str(counts[status]) for status in statuses), *tried])
    return [*table(head, rows), *_not_completed(study)]


def _not_completed(study: Study) -> list[str]:
    """Return a line per reason, shared by runs that differ only in their seed."""
    reasons: dict[tuple[str, str, Cell, str, str], list[int]] = {}
    for run in study.records:
        if run.status != "completed":
            status = run.status.replace("_", " ") + (" (diverged)" if run.diverged else "")
            key = run.kind, run.method, run.cell, status, run.error
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


def tuning_section(study: Study, setting: tuple[str, str], reference: str) -> list[str]:
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


def _tuning(study: Study, cell: Cell, method: str) -> str:
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


def _trials(study: Study, cell: Cell, method: str) -> str:
    """Return the number of trials, and how many of them completed if not all."""
    found = _trials_of(study, cell, method)
    completed = sum(trial.status == "completed" for trial in found)
    return str(completed) if completed == len(found) else f"{completed} of {len(found)}"


def _trials_of(study: Study, cell: Cell, method: str) -> Sequence[Record]:
    return [r for r in study.records if r.kind == "trial" and r.cell == cell and r.method == method]


def _edge(value: float, tried: Sequence[float]) -> str:
    """Return an arrow if a value is the highest or lowest of several."""
    if len(set(tried)) < 2:
        return ""
    return {max(tried): "↑", min(tried): "↓"}.get(value, "")
