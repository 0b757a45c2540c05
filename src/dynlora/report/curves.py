"""Draw charts of the logged loss and validation metrics over the optimizer steps."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from dynlora.report import svg
from dynlora.report.wording import lower_is_better, metric_text

WIDTH, HEIGHT = 360, 210  # pixels, which fit a telephone
LEFT, TOP, RIGHT, BOTTOM = 46, 44, WIDTH - 14, HEIGHT - 26  # the axes
TICKS = 4  # most numbers per axis
MARGIN = 0.05  # free part of the height above and below the lines
MOST_POINTS = 500  # maximum number of points per line; longer series are averaged in groups
SMALLEST = 1e-300  # smallest distance of values to draw, because that of ticks would become 0
LARGEST = 1e300  # largest absolute value to draw, because the range of larger values overflows
Points = Sequence[tuple[int, float]]
Lines = Mapping[str, Points]  # by label, `training` or `validation`, which is also a colour


def charts(metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Lines]:
    """Return the lines of the loss and of each validation metric with logged values, by name.

    `names` are validation metrics without the prefix `eval_`.
    """
    evaluations = [line for line in metrics if "loss" not in line]  # the Trainer's own lines
    found = {}
    for name in dict.fromkeys(["loss", *names]):
        training = _thin(_series(metrics, "loss")) if name == "loss" else ()
        lines = {"training": training, "validation": _series(evaluations, f"eval_{name}")}
        found[name] = {label: line for label, line in lines.items() if line}
    return {name: lines for name, lines in found.items() if lines}


def draw_chart(name: str, lines: Lines, *, at: Sequence[int], steps: int) -> svg.Drawing:
    """Draw a metric in a run of `steps` optimizer steps with events `at` some of them."""
    end = max([1, steps, *at])
    values = [value for points in lines.values() for _, value in points]
    low, high = _range(values)

    def place(step: float, value: float) -> tuple[float, float]:
        part = (value - low) / (high - low)
        return LEFT + (RIGHT - LEFT) * step / end, BOTTOM - (BOTTOM - TOP) * part

    better = "lower is better" if lower_is_better(name) else "higher is better"
    shapes = [
        svg.text(LEFT, 16, name, style=' font-size="13.5" font-weight="bold"'),
        svg.text(RIGHT, 16, better, "soft", "end"),
    ]
    for value in svg.ticks(low, high, TICKS):
        _, y = place(0, value)
        shapes += [svg.line([(LEFT, y), (RIGHT, y)], "line")]
        shapes += [svg.text(LEFT - 6, y + 4, _label(value), "soft", "end")]
    for step in svg.ticks(0, end, TICKS, whole=True):
        x, _ = place(step, low)
        shapes += [svg.text(x, BOTTOM + 17, f"{step:,.0f}", "soft", "middle")]
    shapes += [svg.line([(LEFT, BOTTOM), (RIGHT, BOTTOM)], "soft")]
    for label, points in lines.items():
        drawn = [place(*point) for point in points]
        shapes += [svg.line(drawn, label, ' stroke-width="1.7"')]
        if label == "validation" or len(drawn) == 1:
            dot = f'r="3" fill="var(--{label})"'
            shapes += [f'<circle cx="{x:.6g}" cy="{y:.6g}" {dot}/>' for x, y in drawn]
    shapes += svg.event_marks([place(step, low)[0] for step in at], TOP, BOTTOM, TOP - 5)
    told = "; ".join(
        f"{label} from {metric_text(points[0][1])} at step {points[0][0]} to "
        f"{metric_text(points[-1][1])} at step {points[-1][0]}"
        for label, points in lines.items()
    )
    return svg.Drawing(WIDTH, HEIGHT, f"{name} over the optimizer steps", f"{told}.", shapes)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest value to draw, with a margin."""
    low, high = min(values), max(values)
    margin, largest = MARGIN * (high - low), max(abs(low), abs(high))
    if margin <= max(1e-9 * largest, SMALLEST):  # too close for labels to differ
        margin = MARGIN * (largest if largest > SMALLEST else 1)
    return low - margin, high + margin


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
