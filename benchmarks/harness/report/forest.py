"""Figure: each method's difference from the reference, with intervals, by budget."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks.harness.report.comparison import PairedComparison, Quantity, Verdict
from benchmarks.harness.report.style import GREY, blank, drawing, look, svg
from dynlora.report.wording import lower_is_better

ROW = 0.19
"""Inches per row."""
Row = tuple[int, str]
"""Budget and method."""


def forest_figure(
    comparisons: Sequence[PairedComparison], reference: str, methods: Sequence[str]
) -> bytes | None:
    """Draw comparisons of one model and task as SVG; None if none has two pairs.

    A filled marker is a difference that is significant after the correction.

    Args:
        comparisons: Comparisons of one model and task.
        reference: Reference method.
        methods: All methods of the study, so that each keeps its colour.
    """
    drawn = [c for c in comparisons if c.p is not None]
    if not drawn:
        return None
    rows = list(dict.fromkeys((c.cell.budget, c.method) for c in drawn))
    kinds = [q for q in Quantity if any(c.quantity is q for c in drawn)]
    with drawing():
        figure = blank(2.0 + 2.6 * len(kinds), 0.9 + ROW * (len(rows) + len(_budgets(rows))))
        grid = figure.subplots(1, len(kinds), sharey=True, squeeze=False)
        looks = look(methods, reference)
        for axes, quantity in zip(grid[0], kinds, strict=True):
            _panel(axes, [c for c in drawn if c.quantity is quantity], rows, looks)
        grid[0, 0].set_yticks(
            [_place(rows, row) for row in rows],
            [f"{method}, {budget:,}" for budget, method in rows],
        )
        grid[0, 0].set_ylabel("method, budget")
        grid[0, 0].set_ylim(_place(rows, rows[-1]) + 0.8, -0.8)
        return svg(figure)


def _budgets(rows: Sequence[Row]) -> list[int]:
    return list(dict.fromkeys(budget for budget, _ in rows))


def _place(rows: Sequence[Row], row: Row) -> float:
    """Return a row's vertical position, with gaps between budgets."""
    return rows.index(row) + 0.7 * _budgets(rows).index(row[0])


def _panel(
    axes: Axes,
    comparisons: Sequence[PairedComparison],
    rows: Sequence[Row],
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    axes.axvline(0.0, color=GREY, linewidth=0.9)
    for found in comparisons:
        y = _place(rows, (found.cell.budget, found.method))
        own = looks[found.method]
        if found.interval:
            axes.plot(found.interval, [y, y], color=own["color"], linewidth=1.3)
        fill = "white" if found.verdict is Verdict.OPEN else own["color"]
        axes.plot(found.mean, y, **own, markersize=5, markerfacecolor=fill)
    first = comparisons[0]
    name = f"{first.quantity.split()[0]} {first.metric}"
    better = "← better" if lower_is_better(first.metric) else "better →"
    axes.set_xlabel(f"difference in {name}\n{better}")
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
