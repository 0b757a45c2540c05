"""Section: agreement of a method's seeds on the layers with more rank."""

from benchmarks.harness.report.agreement import Agreement, agreement
from benchmarks.harness.report.markdown import escape, table
from benchmarks.harness.report.record import Cell
from benchmarks.harness.report.study import Study


def agreement_section(study: Study, setting: tuple[str, str], reference: str) -> list[str]:
    """Return a table of methods by budgets; empty if no run has ranks."""
    cells = study.budgets(setting)
    rows = []
    for method in study.methods(first=reference):
        texts = [_text(study, cell, method) for cell in cells]
        if any(texts):
            rows.append([escape(method), *(text or "–" for text in texts)])
    if not rows:
        return []
    lead = (
        "Agreement of final ranks across seeds: mean Spearman correlation over pairs of seeds, "
        "and Kendall's W."
    )
    head = ["method", *(f"budget {cell.budget:,}" for cell in cells)]
    return [lead, "", *table(head, rows)]


def _text(study: Study, cell: Cell, method: str) -> str:
    """Return a cell of the table; empty if no run has ranks."""
    patterns = [run.final_ranks for run in study.usable(cell, method).values() if run.final_ranks]
    return agreement_text(agreement(patterns)) if patterns else ""


def agreement_text(found: Agreement | None) -> str:
    """Format an agreement."""
    if found is None:
        return "layers differ"
    if found.all_equal:
        return "all equal"
    equal = f", {found.constant} of {found.seeds} all equal" if found.constant else ""
    if found.spearman is None or found.kendall is None:
        return f"one seed{equal}"
    return f"{found.spearman:.2f}, W {found.kendall:.2f}{equal}".replace("-", "−")
