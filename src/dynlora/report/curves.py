"""Draw charts of the logged loss and validation metrics over the optimizer steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dynlora.report.axes import Scale, event_marks, label, round_steps, step_axis
from dynlora.report.markup import Node, append, figure, node
from dynlora.report.wording import lower_is_better, metric_text

WIDTH, HEIGHT = 470, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 40, 34
MOST_POINTS = 500
"""Maximum number of points per line; longer series are averaged in groups."""
LARGEST = 1e300
"""Largest absolute value to draw, because the range of larger values overflows."""
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart."""

    label: str
    style: str
    """CSS class in `page.css`."""
    points: Points


def charts(
    metrics: Sequence[Mapping[str, Any]], names: Sequence[str], *, at: Sequence[int], steps: int
) -> list[Node]:
    """Return a chart of the loss and one per validation metric with logged values.

    Args:
        metrics: Lines of `metrics.jsonl`.
        names: Validation metrics, without the prefix `eval_`.
        at: Steps of the events.
        steps: Optimizer steps of the whole run.
    """
    lines = {
        "loss": [
            Line("training", "training", thin(series(metrics, "loss"))),
            Line("validation", "validation", series(metrics, "eval_loss")),
        ]
    }
    for name in names:
        if name != "loss":
            lines[name] = [Line("validation", "validation", series(metrics, f"eval_{name}"))]
    drawn = {name: [line for line in found if line.points] for name, found in lines.items()}
    return [
        _chart(name, found, at, max([1, steps, *at]), f"chart-{number}")
        for number, (name, found) in enumerate(drawn.items(), start=1)
        if found
    ]


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> Points:
    """Return steps and values of a logged key, without values that cannot be drawn."""
    points = []
    for line in metrics:
        value = line.get(key)
        if isinstance(value, int | float) and abs(value) <= LARGEST:
            points.append((line["step"], float(value)))
    return points


def thin(points: Points) -> Points:
    """Average groups of neighbouring points so that at most `MOST_POINTS` remain."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [(group[-1][0], fmean(value for _, value in group)) for group in groups]


def _chart(name: str, lines: Sequence[Line], at: Sequence[int], steps: int, key: str) -> Node:
    values = [value for line in lines for _, value in line.points]
    low, high = _range(values)
    x = Scale(0, steps, LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    told = "; ".join(
        f"{line.label} from {metric_text(line.points[0][1])} at step {line.points[0][0]} to "
        f"{metric_text(line.points[-1][1])} at step {line.points[-1][0]}"
        for line in lines
    )
    svg = figure(f"{name} over the optimizer steps", f"{told}.", WIDTH, HEIGHT, key)
    better = "lower is better" if lower_is_better(name) else "higher is better"
    append(svg, node("text", name, class_="chart", x=LEFT, y=14))
    append(svg, node("text", better, class_="hint", x=WIDTH - RIGHT, y=14, text_anchor="end"))
    append(svg, _value_axis(y, round_steps(low, high, 4), x))
    append(svg, step_axis(x, HEIGHT - BOTTOM, offset=16.0))
    append(svg, event_marks(at, x, TOP, HEIGHT - BOTTOM))
    for line in lines:
        append(svg, _line(line, x, y))
    return node("div", svg, _legend(lines), class_="chart")


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return round limits of the value axis that include all values."""
    low, high = min(values), max(values)
    least = 1e-9 * max(1.0, abs(low), abs(high))
    if high - low < least:
        low, high = low - max(0.5, least), high + max(0.5, least)
    marks = round_steps(low - (high - low), high + (high - low), 12)
    below = [mark for mark in marks if mark <= low]
    return max(below), min(mark for mark in marks if mark >= high)


def _value_axis(y: Scale, marks: Sequence[float], x: Scale) -> Node:
    group = node("g", class_="axis")
    for mark in marks:
        append(group, node("line", x1=x.begin, x2=x.end, y1=y(mark), y2=y(mark), class_="grid"))
        append(group, node("text", label(mark), x=x.begin - 7, y=y(mark) + 4, text_anchor="end"))
    return group


def _line(line: Line, x: Scale, y: Scale) -> Node:
    group = node("g", class_=line.style)
    places = [(x(step), y(value)) for step, value in line.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    append(group, node("polyline", points=path))
    for (step, value), (a, b) in zip(line.points, places, strict=True):
        if line.style == "validation":
            told = node("title", f"step {step}: {metric_text(value)}")
            append(group, node("circle", told, cx=a, cy=b, r=3.2))
    return group


def _legend(lines: Sequence[Line]) -> Node:
    legend = node("p", class_="legend")
    for line in lines:
        last = metric_text(line.points[-1][1])
        append(legend, node("span", f"{line.label} {last}", class_=line.style))
    return legend
