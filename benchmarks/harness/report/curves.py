"""Figure: loss and main metric of each method against parameter count."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.harness.report.comparison import Quantity, value_of
from benchmarks.harness.report.results import StudyResults
from benchmarks.harness.report.style import axis_label, blank, drawing, look, svg

DODGE = 0.08
"""Share of the parameter axis over which methods of one budget are spread."""
ALONE = 0.7
"""The same share for a single budget, without a line."""
LEGEND_COLUMNS = 3
PALE = 0.5
"""Opacity of error bars, because they overlap."""
LEAST_SPAN = math.log(2)
"""Minimum width of the parameter axis, as a log ratio."""


@dataclass(frozen=True, slots=True)
class Point:
    """Means of a method's runs in one cell."""

    parameters: float
    value: float
    spread: float
    """Standard deviation; 0 for a single run."""


def curves_figure(study: StudyResults, setting: tuple[str, str], reference: str) -> bytes | None:
    """Draw a model and task as SVG; None without usable runs."""
    methods = study.methods(first=reference)
    metric = study.metric(setting)
    quantities = {Quantity.LOSS: "validation loss", Quantity.METRIC: f"validation {metric}"}
    found = {
        quantity: {m: _points(study, setting, m, quantity) for m in methods}
        for quantity in quantities
    }
    rows = [quantity for quantity in quantities if any(found[quantity].values())]
    if not rows:
        return None
    drawn = [method for method in methods if found[Quantity.LOSS][method]]
    with drawing():
        legend_rows = -(-len(drawn) // LEGEND_COLUMNS)
        figure = blank(5.6, 2.7 * len(rows) + 0.4 + 0.2 * legend_rows)
        grid = figure.subplots(len(rows), sharex=True, squeeze=False)
        looks = look(methods, reference)
        for row, quantity in enumerate(rows):
            points = {method: found[quantity][method] for method in drawn}
            _by_parameters(grid[row, 0], points, looks)
            grid[row, 0].set_ylabel(quantities[quantity])
        axis_label(grid[-1, 0], "adapter parameters at the end", grid[-1, 0].get_ylabel())
        handles = list(grid[0, 0].containers)
        columns = min(LEGEND_COLUMNS, len(drawn))
        figure.legend(handles, drawn, loc="outside lower center", ncols=columns)
        return svg(figure)


def _points(
    study: StudyResults, setting: tuple[str, str], method: str, quantity: Quantity
) -> list[Point]:
    """Return a point per budget with usable runs."""
    points = []
    for cell in study.budgets(setting):
        runs = list(study.usable(cell, method).values())
        values = [value for run in runs if (value := value_of(run, quantity)) is not None]
        if values:
            point = Point(
                max(1.0, fmean(run.parameters.end for run in runs)),  # for the log axis
                fmean(values),
                stdev(values) if len(values) > 1 else 0.0,
            )
            points.append(point)
    return points


def _by_parameters(
    axes: Axes,
    points: Mapping[str, Sequence[Point]],
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draw values against parameters, with methods of equal size side by side."""
    everywhere = sorted(point.parameters for line in points.values() for point in line)
    middle = (math.log(everywhere[0]) + math.log(everywhere[-1])) / 2
    span = max(LEAST_SPAN, math.log(everywhere[-1] / everywhere[0]))
    ticks = _ticks(everywhere, span)
    step = (DODGE if len(ticks) > 1 else ALONE) * span / max(1, len(points) - 1)

    def place(point: Point, number: int) -> float:
        return point.parameters * math.exp(step * (number - (len(points) - 1) / 2))

    axes.set_xscale("log")
    _lines(axes, points, looks, place)
    axes.set_xlim(math.exp(middle - 0.6 * span), math.exp(middle + 0.6 * span))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def _ticks(sorted_values: Sequence[float], span: float) -> list[float]:
    """Return the median of each group of close values."""
    groups: list[list[float]] = []
    for value in sorted_values:
        if groups and math.log(value / groups[-1][0]) < 0.1 * span:
            groups[-1].append(value)
        else:
            groups.append([value])
    return [median(group) for group in groups]


def _lines(
    axes: Axes,
    points: Mapping[str, Sequence[Point]],
    looks: Mapping[str, Mapping[str, Any]],
    place: Callable[[Point, int], float],
) -> None:
    for number, (method, line) in enumerate(points.items()):
        axes.errorbar(
            [place(point, number) for point in line],
            [point.value for point in line],
            yerr=[point.spread for point in line],
            **looks[method],
            markersize=4.5,
            linewidth=1.1,
            elinewidth=0.9,
            ecolor=(looks[method]["color"], PALE),
        )


def short_count(value: float) -> str:
    """Format a parameter count with three digits: `73.7k`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
