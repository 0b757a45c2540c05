"""Draw charts of the logged loss and validation metrics over the optimizer steps."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

from dynlora.report.svg import LIGHT, Drawing, blank, drawable, drawing_style, mark_events
from dynlora.report.wording import lower_is_better, metric_text

WIDTH, HEIGHT = 420, 220
BOX = (52, 40, WIDTH - 18, HEIGHT - 34)  # left, top, right and bottom of the axes
MOST_POINTS = 500  # maximum number of points per line; longer series are averaged in groups
LARGEST = 1e300  # largest absolute value to draw, because the range of larger values overflows
Points = Sequence[tuple[int, float]]
Lines = Mapping[str, Points]  # by label, `training` or `validation`, which is also a colour


def charts(metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Lines]:
    """Return the lines of the loss and of each validation metric with logged values, by name.

    `names` are validation metrics without the prefix `eval_`.
    """
    found = {}
    for name in dict.fromkeys(["loss", *names]):
        training = _thin(_series(metrics, "loss")) if name == "loss" else ()
        lines = {"training": training, "validation": _series(metrics, f"eval_{name}")}
        found[name] = {label: line for label, line in lines.items() if line}
    return {name: lines for name, lines in found.items() if lines}


def draw_chart(name: str, lines: Lines, *, at: Sequence[int], steps: int) -> Drawing:
    """Draw a metric in a run of `steps` optimizer steps with events `at` some of them."""
    with drawing_style():
        figure, axes = blank(WIDTH, HEIGHT, BOX)
        for label, points in lines.items():
            marker = {"marker": "o", "markersize": 6} if label == "validation" else {}
            axes.plot(*zip(*points, strict=True), color=LIGHT[label], linewidth=1.7, clip_on=False)
            axes.lines[-1].set(**marker)
        axes.set_xlim(0, max([1, steps, *at]))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _label(value)))
        axes.grid(axis="y", color=LIGHT["line"], linewidth=1, clip_on=False)
        axes.spines["bottom"].set(visible=True, color=LIGHT["soft"])
        better = "lower is better" if lower_is_better(name) else "higher is better"
        axes.text(0, 1.15, drawable(name), fontsize=13.5, weight="bold", transform=axes.transAxes)
        axes.text(
            1, 1.15, better, fontsize=11, ha="right", color=LIGHT["soft"], transform=axes.transAxes
        )
        low, high = axes.get_ylim()
        axes.set_ylim(low, high)
        mark_events(axes, at, high + 0.02 * (high - low))
    told = "; ".join(
        f"{label} from {metric_text(points[0][1])} at step {points[0][0]} to "
        f"{metric_text(points[-1][1])} at step {points[-1][0]}"
        for label, points in lines.items()
    )
    return Drawing(figure, f"{name} over the optimizer steps", f"{told}.")


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> Points:
    """Return steps and values of a logged key, without values that cannot be drawn."""
    points = []
    for line in metrics:
        value = line.get(key)
        if isinstance(value, int | float) and abs(value) <= LARGEST:
            points.append((line["step"], float(value)))
    return points


def _thin(points: Points) -> Points:
    """Average groups of neighbouring points so that at most `MOST_POINTS` remain."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [(group[-1][0], fmean(value for _, value in group)) for group in groups]


def _label(value: float) -> str:
    """Format a round number without floating-point noise."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
