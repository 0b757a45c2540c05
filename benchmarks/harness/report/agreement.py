"""Step 5. Whether a method ranks the layers alike for all seeds, with its section."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.harness.report.markdown import escape, table
from benchmarks.harness.report.results import Cell, StudyResults


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Similarity of the rank patterns of several seeds."""

    seeds: int
    constant: int
    """Seeds with equal ranks on all layers, which have no order of layers."""
    spearman: float | None
    """Mean correlation over pairs of the other seeds; None with fewer than two."""
    kendall: float | None
    """Kendall's W of the other seeds, corrected for ties; None with fewer than two."""

    @property
    def all_equal(self) -> bool:
        """Whether all seeds have equal ranks on all layers."""
        return self.constant == self.seeds


def agreement(patterns: Sequence[Mapping[str, int]]) -> Agreement | None:
    """Return the agreement of several runs' final ranks; None if their layers differ.

    Args:
        patterns: Rank by module name per seed; at least one, none empty.
    """
    names = sorted(patterns[0])
    if any(sorted(pattern) != names for pattern in patterns):
        return None
    moved = [[pattern[name] for name in names] for pattern in patterns]
    moved = [ranks for ranks in moved if len(set(ranks)) > 1]
    orders = stats.rankdata(moved, axis=1) if moved else np.empty((0, len(names)))
    several = len(moved) >= 2
    return Agreement(
        seeds=len(patterns),
        constant=len(patterns) - len(moved),
        spearman=_mean_spearman(orders) if several else None,
        kendall=_kendall_w(orders) if several else None,
    )


def _mean_spearman(orders: np.ndarray) -> float:
    """Return the mean Spearman correlation over all pairs of seeds.

    Args:
        orders: Ranks of the layers' values, averaged over ties, of shape ``(seeds, layers)``.
    """
    correlations = np.corrcoef(orders)
    return float(correlations[np.triu_indices(len(orders), k=1)].mean())


def _kendall_w(orders: np.ndarray) -> float:
    """Return Kendall's coefficient of concordance: 0 for no agreement, 1 for the same order.

    Args:
        orders: Ranks of the layers' values, averaged over ties, of shape ``(seeds, layers)``.
    """
    seeds, layers = orders.shape
    counts = [np.unique(order, return_counts=True)[1] for order in orders]
    ties = sum(float((count**3 - count).sum()) for count in counts)
    spread = 12 * float(orders.sum(axis=0).var() * layers)
    return spread / float(seeds**2 * (layers**3 - layers) - seeds * ties)


def agreement_section(study: StudyResults, setting: tuple[str, str], reference: str) -> list[str]:
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


def _text(study: StudyResults, cell: Cell, method: str) -> str:
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
