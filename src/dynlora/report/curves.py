"""Draw charts of the logged loss and validation metrics over the optimizer steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from dynlora.report import svg
from dynlora.report.wording import lower_is_better, metric_text, shorten

WIDTH, HEIGHT = 360, 210  # pixels, which fit a telephone
LEFT, TOP, RIGHT, BOTTOM = 46, 44, WIDTH - 14, HEIGHT - 26  # the axes
TICKS = 4  # most numbers per axis
MARGIN = 0.05  # free part of the height above and below the lines
MOST_POINTS = 500  # maximum number of points per line; longer series are averaged in groups
DIGITS = 4  # fewest digits of an axis
CLOSEST = 1e-6  # smallest margin relative to the largest value, because labels must differ
SMALLEST = 1e-300  # smallest distance of values to draw, because that of ticks would become 0
LARGEST = 1e300  # largest absolute value to draw, because the range of larger values overflows
Points = Sequence[tuple[int, float]]
Lines = Mapping[str, Points]  # by label: `training`, `validation` or a key of `DASHES`; a colour
DASHES = dict(zip(svg.RUNS, ("", "7 3", "2 3", "10 3 2 3", "4 4", "14 4"), strict=True))
"""Dash pattern of a run's line, in a chart that compares runs; the line ends with the number."""
APART = 11  # minimum distance of the numbers at line ends


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
    shapes, height = axes(name, values)

    def place(step: float, value: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * step / end, height(value)

    for step in svg.ticks(0, end, TICKS, whole=True):
        x, _ = place(step, values[0])
        shapes += [svg.text(x, BOTTOM + 17, f"{step:,.0f}", "soft", "middle")]
    ends = {}
    for label, points in lines.items():
        drawn = [place(*point) for point in points]
        shapes += [svg.line(drawn, label, line_style(label))]
        if label in DASHES:
            ends[label] = drawn[-1]
        if label == "validation" or len(drawn) == 1:
            shapes += [svg.dot(*point, label, label) for point in drawn]
    shapes += _numbers(ends)
    shapes += svg.event_marks([place(step, values[0])[0] for step in at], TOP, BOTTOM, TOP - 5)
    told = "; ".join(
        f"{label} from {metric_text(points[0][1])} at step {points[0][0]} to "
        f"{metric_text(points[-1][1])} at step {points[-1][0]}"
        for label, points in lines.items()
    )
    return svg.Drawing(WIDTH, HEIGHT, f"{name} over the optimizer steps", f"{told}.", shapes)


def line_style(label: str) -> str:
    """Return the width and the dashes of a line."""
    dashes = f' stroke-dasharray="{DASHES[label]}"' if DASHES.get(label) else ""
    return f' stroke-width="1.7"{dashes}'


def axes(name: str, values: Sequence[float]) -> tuple[list[str], Callable[[float], float]]:
    """Return the heading and the value axis of a metric, and a function from value to height."""
    low, high = value_range(values)

    def height(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    metric = name.rpartition(" ")[2]
    better = "lower is better" if lower_is_better(metric) else "higher is better"
    shapes = [
        svg.text(LEFT, 16, shorten(name, 24), style=f' font-size="13.5"{svg.BOLD}'),
        svg.text(RIGHT, 16, better, "soft", "end"),
    ]
    marks = svg.ticks(low, high, TICKS)
    for value, label in zip(marks, _labels(marks), strict=True):
        y = height(value)
        shapes += [svg.line([(LEFT, y), (RIGHT, y)], "line")]
        shapes += [svg.text(LEFT - 6, y + 4, label, "soft", "end")]
    return [*shapes, svg.line([(LEFT, BOTTOM), (RIGHT, BOTTOM)], "soft")], height


def _labels(marks: Sequence[float]) -> list[str]:
    """Return the numbers of an axis with as many digits as make them differ, four or more."""
    for digits in range(DIGITS, DIGITS + 3):
        labels = [
            f"{x:,.0f}" if 1000 <= abs(x) < 1e6 and digits == DIGITS else f"{x:.{digits}g}"
            for x in marks
        ]
        if len({*labels}) == len(labels):
            break
    return labels


def _numbers(ends: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    """Yield the number of each run beside the end of its line, without overlaps."""
    base: float = TOP - APART
    lowest = BOTTOM - APART * (len(ends) - 1)
    for place, (label, (x, y)) in enumerate(sorted(ends.items(), key=lambda each: each[1][1])):
        base = min(max(y, base + APART), lowest + APART * place)
        yield svg.text(x + 4, base + 4, label.removeprefix("run"), label, style=svg.BOLD)


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest value to draw, with a margin."""
    low, high = min(values), max(values)
    margin, largest = MARGIN * (high - low), max(abs(low), abs(high))
    if margin <= max(CLOSEST * largest, SMALLEST):
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
    """Average groups of neighbouring points so that at most `MOST_POINTS` remain; keep the last."""
    if len(points) <= MOST_POINTS:
        return points
    *earlier, last = points
    size = -(-len(earlier) // (MOST_POINTS - 1))
    groups = [earlier[n : n + size] for n in range(0, len(earlier), size)]
    return [*((group[-1][0], fmean(value for _, value in group)) for group in groups), last]
