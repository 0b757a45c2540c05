"""Draw several runs, and write their comparison as one HTML page without scripts."""

import math
from collections.abc import Mapping, Sequence

from dynlora.report import curves, page, svg
from dynlora.report.pairs import Numbered, front_of, trade_off
from dynlora.report.rank_map import rank_map, scale_of
from dynlora.report.run_comparison import compare_runs, labels_of
from dynlora.report.tables import comparison_tables, main_metric, run_table
from dynlora.report.wording import shorten

LONGEST = 40  # characters of a run's name in legends and headings
MAPS = 12  # maximum number of rank maps
MAP_WIDTH = 200  # pixels of a map's axis of steps; two maps are side by side
DOT = 4.5  # radius in pixels
ROOM = (14, 11)  # width and height of a number beside a dot
TICK = 62  # minimum distance of parameter counts
LINE = 15  # height of a line of a legend


def comparison_page(runs: Numbered) -> str:
    """Return the page that compares two or more runs as HTML."""
    metric, tables = main_metric(runs), comparison_tables(runs)
    labels = labels_of([*runs.values()])
    finished = [run for run in runs.values() if run.status == "finished"]
    drawn: dict[str, dict[str, str]] = {"chart": {}, "front": {}, "map": {}}
    for name, drawing in drawings(runs).items():
        kind, _, number = name.partition("-")
        drawn[kind][number] = svg.to_svg(drawing, name)
    return page.PAGES.get_template("comparison.html.j2").render(
        runs=runs,
        labels=dict(zip(runs, (shorten(label, LONGEST) for label in labels), strict=True)),
        warnings=compare_runs(finished).warnings if finished else (),
        tables={"runs": run_table(runs)} | tables,
        drawn=drawn,
        dashes={number: curves.DASHES[f"run{number}"] for number in compared(runs)},
        reach=common_scale(runs).reach,
        moving=sum(bool(run.initial_ranks) for run in runs.values()),
        metric=metric,
    )


def drawings(runs: Numbered) -> dict[str, svg.Drawing]:
    """Return `chart-1` and more, `front`, and `map-N` for a run of number N with moving ranks."""
    metric, found = main_metric(runs), {}
    for number, (name, lines) in enumerate(_charts(runs).items(), start=1):
        steps = max(run.steps for run in runs.values())
        found[f"chart-{number}"] = curves.draw_chart(name, lines, at=[], steps=steps)
    points = trade_off(runs, metric)
    if points:
        found["front"] = draw_trade_off(points, front_of(points, metric), metric)
    scale, moving = common_scale(runs), [n for n, run in runs.items() if run.initial_ranks]
    for number in moving[:MAPS]:
        run = runs[number]
        found[f"map-{number}"] = rank_map(
            run.events, run.initial_ranks, steps=run.steps, scale=scale, width=MAP_WIDTH
        )
    return found


def common_scale(runs: Numbered) -> svg.RankScale:
    """Return the colour scale that covers the ranks of all runs."""
    scales = [scale_of(run.events, run.initial_ranks, run.final_ranks)
              for run in runs.values() if run.initial_ranks]  # fmt: skip
    return max(scales, key=lambda scale: scale.reach, default=svg.rank_scale([]))


def compared(runs: Numbered) -> list[int]:
    """Return the numbers of the runs in charts: as many as lines remain readable."""
    return [*runs][: len(curves.DASHES)]


def _charts(runs: Numbered) -> dict[str, curves.Lines]:
    """Return a line per run by logged quantity, such as `training loss`."""
    names = dict.fromkeys(name for run in runs.values() for name in (*run.before, *run.after))
    found: dict[str, dict[str, curves.Points]] = {}
    for number in compared(runs):
        for name, lines in curves.charts(runs[number].metrics, [*names]).items():
            for label, points in lines.items():
                title = f"{label} loss" if name == "loss" else name
                found.setdefault(title, {})[f"run{number}"] = points
    return {**found}


def draw_trade_off(
    points: Mapping[int, tuple[float, float]], front: set[int], metric: str
) -> svg.Drawing:
    """Draw a metric over parameters on a logarithmic axis; dots on the Pareto front are full."""
    shapes, height = curves.axes(metric, [value for _, value in points.values()])
    low, high = curves.value_range([math.log10(size) for size, _ in points.values()])

    def across(size: float) -> float:
        return curves.LEFT + (curves.RIGHT - curves.LEFT) * (math.log10(size) - low) / (high - low)

    axis = "parameters, logarithmic axis"
    shapes += [svg.text(curves.RIGHT, curves.BOTTOM + 34, axis, "soft", "end")]
    last = -math.inf
    for size in sorted({size for size, _ in points.values()}):
        x = min(max(across(size), curves.LEFT + TICK / 2), curves.RIGHT - TICK / 2)
        if x - last >= TICK:
            shapes += [svg.text(x, curves.BOTTOM + 17, f"{size:,.0f}", "soft", "middle")]
            last = x
    places = {n: (across(size), height(value)) for n, (size, value) in points.items()}
    shapes += [svg.line(sorted(places[n] for n in front), "soft", ' stroke-dasharray="3 3"')]
    taken = [(x - ROOM[0] / 2, y + 4) for x, y in places.values()]
    for number, (x, y) in places.items():
        colour = f"run{number}" if f"run{number}" in curves.DASHES else "soft"
        fill = colour if number in front else "paper"
        shapes += [
            f'<circle cx="{x:.6g}" cy="{y:.6g}" r="{DOT}" fill="var(--{fill})" '
            f'stroke="var(--{colour})" stroke-width="1.7"/>'
        ]
        for place in ((x + 7, y + 4), (x - 7 - ROOM[0], y + 4), (x - 6, y - 8), (x - 6, y + 17)):
            if all(abs(place[0] - a) >= ROOM[0] or abs(place[1] - b) >= ROOM[1] for a, b in taken):
                shapes += [svg.text(*place, str(number))]
                taken.append(place)
                break
    told = "; ".join(f"run {n}: {size:,.0f}, {value:.4f}" for n, (size, value) in points.items())
    height_in_all = curves.HEIGHT + LINE
    return svg.Drawing(curves.WIDTH, height_in_all, f"{metric} over parameters", f"{told}.", shapes)


def with_legend(drawing: svg.Drawing, runs: Numbered, shown: Sequence[int]) -> svg.Drawing:
    """Return a chart with the numbers and names of the `shown` runs below it, for a file."""
    labels, shapes = labels_of([*runs.values()]), [*drawing.shapes]
    for place, number in enumerate(shown, start=1):
        y, colour = drawing.height + LINE * place - 6, f"run{number}"
        if colour in curves.DASHES:
            style = f' stroke-width="1.7" stroke-dasharray="{curves.DASHES[colour]}"'
            shapes += [svg.line([(curves.LEFT, y - 4), (curves.LEFT + 30, y - 4)], colour, style)]
        name = shorten(labels[number - 1], LONGEST)
        shapes += [svg.text(curves.LEFT + 38, y, f"{number} {name}")]
    height = drawing.height + LINE * len(shown) + 4
    return svg.Drawing(drawing.width, height, drawing.title, drawing.description, shapes)
