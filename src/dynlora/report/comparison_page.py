"""Draw several runs, and return their comparison as one HTML page without scripts."""

import math
from collections.abc import Mapping, Sequence

from dynlora.report import curves, page, svg
from dynlora.report.rank_map import rank_map, scale_of
from dynlora.report.run_comparison import compare_runs, labels_of
from dynlora.report.tables import Numbered, main_metric, tables_of, trade_off
from dynlora.report.wording import METRICS, shorten

LONGEST = 40  # characters of a run's name in a legend
MAPS = 12  # maximum number of rank maps
MAP_WIDTH = 200  # pixels of a map's axis of steps, so that two maps are side by side
ROOM = 14  # pixels of a number beside a dot
LINE = 15  # height of a line of a legend


def comparison_page(runs: Numbered) -> str:
    """Return the page that compares two or more runs as HTML."""
    drawn = drawings(runs)
    finished = [run for run in runs.values() if run.status == "finished"]
    return page.PAGES.get_template("comparison.html.j2").render(
        runs=runs,
        warnings=compare_runs(finished).warnings if finished else (),
        tables=tables_of(runs),
        drawings=drawn,
        maps=[name for name in drawn if "map" in name],
        most=len(curves.DASHES),
        reach=_scale(runs).reach,
        metric=main_metric(runs),
    )


def drawings(runs: Numbered) -> dict[str, svg.Drawing]:
    """Return `chart-1` and more, `front`, and `map-N` per run N with moving ranks."""
    found, metric = {}, main_metric(runs)
    labels = dict(zip(runs, labels_of([run.root for run in runs.values()]), strict=True))
    lines: dict[str, dict[str, curves.Points]] = {}
    compared = [*runs][: len(curves.DASHES)]
    names = dict.fromkeys(name for run in runs.values() for name in (*run.before, *run.after))
    for number in compared:
        for name, parts in curves.charts(runs[number].metrics, [*names] or METRICS).items():
            for label, points in parts.items():
                title = f"{label} loss" if name == "loss" else name
                lines.setdefault(title, {})[f"run{number}"] = points
    steps = max(run.steps for run in runs.values())
    for place, (name, parts) in enumerate(lines.items(), start=1):
        drawing = curves.draw_chart(name, parts, at=[], steps=steps)
        shown = {n: labels[n] for n in compared if f"run{n}" in parts}
        found[f"chart-{place}"] = _with_legend(drawing, shown)
    sizes = trade_off(runs, metric)
    if sizes:
        drawing = _draw_trade_off(sizes, metric)
        found["front"] = _with_legend(drawing, {number: labels[number] for number in sizes})
    scale = _scale(runs)
    for number, run in [(n, run) for n, run in runs.items() if run.initial_ranks][:MAPS]:
        title = f"{number} {labels[number]}"
        found[f"map-{number}"] = rank_map(
            run.events, run.initial_ranks, steps=run.steps, scale=scale, width=MAP_WIDTH,
            heading=[shorten(title, LONGEST)],
        )  # fmt: skip
    return found


def _scale(runs: Numbered) -> svg.RankScale:
    """Return the colour scale that covers the ranks of all runs."""
    scales = [scale_of(run.events, run.initial_ranks, run.final_ranks)
              for run in runs.values() if run.initial_ranks]  # fmt: skip
    return max(scales, key=lambda scale: scale.reach, default=svg.rank_scale([]))


def _draw_trade_off(points: Mapping[int, tuple[float, float, bool]], metric: str) -> svg.Drawing:
    """Draw a metric over parameters on a logarithmic axis; dots on the Pareto front are full."""
    shapes, height = curves.axes(metric, [value for _, value, _ in points.values()])
    low, high = curves.value_range([math.log10(size) for size, _, _ in points.values()])
    width, base = curves.RIGHT - curves.LEFT, curves.BOTTOM
    shapes += [svg.text(curves.RIGHT, base + 34, "parameters, logarithmic axis", "soft", "end")]
    places = {
        number: (curves.LEFT + width * (math.log10(size) - low) / (high - low), height(value))
        for number, (size, value, _) in points.items()
    }
    sizes = {size: places[number][0] for number, (size, *_) in points.items()}
    for size, anchor in {min(sizes): "start", max(sizes): "end"}.items():
        shapes += [svg.text(sizes[size], base + 17, f"{size:,.0f}", "soft", anchor)]
    front = sorted(places[number] for number, (*_, best) in points.items() if best)
    shapes += [svg.line(front, "soft", ' stroke-dasharray="3 3"')]
    taken = [(x - ROOM / 2, y + 4) for x, y in places.values()]
    for number, (x, y) in places.items():
        colour = f"run{number}" if f"run{number}" in curves.DASHES else "soft"
        shapes += [svg.dot(x, y, colour if points[number][2] else "paper", colour)]
        for place in ((x + 7, y + 4), (x - 7 - ROOM, y + 4), (x - 6, y - 8), (x - 6, y + 17)):
            if all(max(abs(place[0] - a), abs(place[1] - b)) >= ROOM - 2 for a, b in taken):
                shapes += [svg.text(*place, str(number))]
                taken.append(place)
                break
    told = "; ".join(f"run {n}: {size:,.0f}, {value:.4f}" for n, (size, value, _) in points.items())
    title = f"{metric} over parameters"
    return svg.Drawing(curves.WIDTH, curves.HEIGHT + LINE, title, f"{told}.", shapes)


def _with_legend(drawing: svg.Drawing, labels: Mapping[int, str]) -> svg.Drawing:
    """Return a chart with the numbers, lines and names of its runs below it."""
    shapes: Sequence[str] = drawing.shapes
    for place, (number, label) in enumerate(labels.items(), start=1):
        y, colour = drawing.height + LINE * place, f"run{number}"
        if colour in curves.DASHES:
            sample = [(curves.LEFT, y - 4), (curves.LEFT + 32, y - 4)]
            shapes = [*shapes, svg.line(sample, colour, curves.line_style(colour))]
        shapes = [*shapes, svg.text(curves.LEFT + 40, y, f"{number} {shorten(label, LONGEST)}")]
    height = drawing.height + LINE * len(labels) + 8
    return svg.Drawing(drawing.width, height, drawing.title, drawing.description, shapes)
