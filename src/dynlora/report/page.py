"""Write the report of a run as one HTML page without scripts or external files.

`templates/page.html.j2` contains the page; this file computes its values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from dynlora.errors import RunFileError
from dynlora.files import whole
from dynlora.history import MOVERS, moved, reasons, stillness
from dynlora.layer_names import short_names
from dynlora.report import wording
from dynlora.report.curves import Lines, charts, draw_chart
from dynlora.report.layers import arrange
from dynlora.report.rank_map import rank_map, scale_of
from dynlora.report.svg import DARK, LIGHT, Drawing, RankScale, to_svg
from dynlora.runs.reader import RunFiles

MARK = b'<meta name="generator" content="dynlora report">'  # a new report may replace such a file
HEAD_BYTES = 1000  # length of the file's beginning that contains `MARK`
SOURCES = ("path", "name", "subset", "package", "gguf_file")  # keys that identify model or data
LONGEST_CELL = 40  # characters in a table of several runs; CSV files have them all
PAGES = Environment(
    loader=PackageLoader("dynlora.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.globals |= {
    "light": LIGHT,
    "dark": DARK,
    "is_chance": wording.is_chance,
    "chance_text": wording.CHANCE_TEXT,
    "verdict": wording.verdict,
    "change": wording.change_text,
    "share": wording.share_text,
}
PAGES.filters |= {
    "metric": wording.metric_text,
    "count": wording.count_text,
    "about": wording.about_text,
    "bytes": wording.bytes_text,
    "seconds": wording.seconds_text,
    "cell": lambda value: wording.shorten(wording.cell_text(value), LONGEST_CELL),
    "svg": to_svg,
    "yaml": lambda values: yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True),
}


def report_page(run: RunFiles) -> str:
    """Return the page about a finished or unfinished run as HTML."""
    return PAGES.get_template("page.html.j2").render(
        run=run,
        name=run.root.resolve().name,
        facts=facts_of(run),
        curves=curve_values(run),
        ranks=rank_values(run, run.steps),
    )


def curve_values(run: RunFiles) -> dict[str, Any]:
    """Return the values of the sections about metrics, parameters, time and memory."""
    metrics = list(dict.fromkeys([*run.before, *run.after]))
    drawn = charts(run.metrics, metrics or wording.METRICS)
    budget = {} if run.budget is None else {"budget": run.budget}
    return {
        "metrics": metrics,
        "parameters": {**run.parameters, **budget},
        "costs": list(_costs(run)),
        "charts": list(_draw(drawn, run)),
        "evaluations": _evaluations(drawn),
    }


def rank_values(run: RunFiles, steps: int, most: int | None = None) -> dict[str, Any]:
    """Return the values of the sections about ranks and events.

    `steps` is the map's last step, and `most` the number of layers to draw, all if None.
    """
    drawn, left_out = run, ""
    if most is not None:
        drawn = _most_moved(run, most)
        left_out = (
            f" Of {len(run.final_ranks):,} layers, these are the {most:,} whose ranks moved most: "
            "`dynlora report` shows all."
        )
    scale = scale_of(drawn.events, drawn.initial_ranks, drawn.final_ranks)
    highest = max([1, *drawn.final_ranks.values()])
    return {
        "scale": scale,
        "rank_map": _rank_map(run, drawn, scale, steps) if run.initial_ranks else None,
        "parts": arrange(list(drawn.final_ranks)),
        "layers": {name: _layer(drawn, name, scale, highest) for name in drawn.final_ranks},
        "left_out": left_out,
        "events": list(_events(run)),
        "reasons": _reasons(run),  # slow with thousands of layers, and not on every page
    }


def _most_moved(run: RunFiles, count: int) -> RunFiles:
    """Return a run of the layers whose ranks changed most since its start."""
    first, last = run.initial_ranks, run.final_ranks
    by_move = sorted(last, key=lambda name: -abs(last[name] - first.get(name, last[name])))
    kept = {*by_move[:count]}
    names = [name for name in last if name in kept]
    events = [replace(e, layers={name: e.layers[name] for name in names}) for e in run.events]
    first, last = ({name: x[name] for name in names if name in x} for x in (first, last))
    return replace(run, initial_ranks=first, final_ranks=last, events=events)


def drawings(run: RunFiles) -> dict[str, Drawing]:
    """Return the charts and the rank map of a run, by a name for files."""
    drawn = [chart["drawing"] for chart in curve_values(run)["charts"]]
    ranks = rank_values(run, run.steps)["rank_map"]
    found = {f"chart-{number}": drawing for number, drawing in enumerate(drawn, start=1)}
    return found if ranks is None else found | {"map-1": ranks["drawing"]}


def check_replaceable(path: Path) -> None:
    """Raise `RunFileError` if a path is neither free nor an earlier report."""
    whole.check_file(path, RunFileError)
    if not path.exists():
        return
    with path.open("rb") as file:
        if MARK not in file.read(HEAD_BYTES):
            raise RunFileError(
                f"`--output` must be a new file or an earlier report, got {path}, which is "
                "neither: give another name."
            )


def write_page(path: Path, html: str) -> None:
    """Write a page atomically."""
    with whole.whole_file(path) as draft:
        draft.write_bytes(html.encode("utf-8", "replace"))


def facts_of(run: RunFiles) -> dict[str, str]:
    """Return the identity of a run as texts by label."""
    counts = [f"{wording.count_text(count)} {split}" for split, count in run.rows.items()]
    rows = f" ({', '.join(counts)} rows)" if counts else ""
    return {
        "task": str(run.facts.get("task", "unknown")).replace("_", " "),
        "method": run.method,
        "model": _source(run.config.get("model")),
        "data": f"{_source(run.config.get('data'))}{rows}",
        "seed": "unknown" if run.seed is None else str(run.seed),
        "steps": wording.count_text(run.steps),
        "written": run.written.replace("T", " ").replace("+00:00", " UTC"),
    }


def _source(section: Any) -> str:
    """Return the values of `SOURCES` in a section of the configuration."""
    if not isinstance(section, Mapping):
        return "unknown"
    given = [str(section[key]) for key in SOURCES if section.get(key) is not None]
    return ", ".join(given) or "unknown"


def _costs(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """Yield seconds per activity and peak memory, with a share of the training steps."""
    for name, value in run.seconds.items():
        dynamic = name == "dynamic_part"
        if not dynamic or run.initial_ranks:
            share = wording.share_text(value, run.seconds.get("training_steps")) if dynamic else ""
            yield name.replace("_", " "), wording.seconds_text(value), share
    for name, size in run.memory.items():
        if size is not None:
            yield name.removesuffix("_bytes").replace("_", " "), wording.bytes_text(size), ""


def _rank_map(run: RunFiles, drawn: RunFiles, scale: RankScale, steps: int) -> dict[str, object]:
    drawing = rank_map(drawn.events, drawn.initial_ranks, steps=steps, scale=scale)
    starts = set(run.initial_ranks.values())
    still = stillness(run.events)
    hint = f"Ranks did not move: {still}."
    if still is None:
        count = sum(map(moved, run.events))
        hint = (
            f"Ranks moved at {count} of {len(run.events)} events, the dashed lines. The numbers in "
            "the rows are ranks; each layer's first and last rank are at the right."
        )
    start = f" ({starts.pop()})" if len(starts) == 1 else ""
    return {"hint": hint, "start": start, "drawing": drawing}


def _layer(run: RunFiles, name: str, scale: RankScale, highest: int) -> dict[str, object]:
    """Return a layer's rank in numbers, words and lengths of its bar."""
    rank = run.final_ranks[name]
    start = run.initial_ranks.get(name, rank)
    strength = scale.strength(rank, start)
    was = f", {start} at the start" if start != rank else ""
    return {
        "rank": rank,
        "told": f"{name}: rank {rank}{was}",
        "share": round(100 * rank / highest, 1),
        "side": "up" if strength > 0 else "down",
        "strength": round(100 * abs(strength)),
    }


def _draw(drawn: Mapping[str, Lines], run: RunFiles) -> Iterator[dict[str, object]]:
    at = [event.step for event in run.events]
    for name, lines in drawn.items():
        drawing = draw_chart(name, lines, at=at, steps=run.steps)
        last = {label: points[-1][1] for label, points in lines.items()}
        yield {"name": name, "drawing": drawing, "last": last}


def _evaluations(drawn: Mapping[str, Lines]) -> dict[int, list[str]]:
    """Return the validation metrics as text by step, in the order of the charts."""
    values = [dict(lines.get("validation", ())) for lines in drawn.values()]
    steps = sorted({step for points in values for step in points})
    return {
        step: [wording.metric_text(points[step]) if step in points else "–" for points in values]
        for step in steps
    }


def _events(run: RunFiles) -> Iterator[dict[str, object]]:
    short = short_names(list(run.initial_ranks))
    for event in run.events:
        ranks = {short[name]: (x.rank_before, x.rank_after) for name, x in event.layers.items()}
        moves = {name: after - before for name, (before, after) in ranks.items() if after != before}
        largest = sorted(moves, key=lambda name: -abs(moves[name]))[:MOVERS]
        waits = [short[name] for name, layer in event.layers.items() if layer.waits]
        more = len(waits) - MOVERS
        yield {
            "step": event.step,
            "agreement": event.agreement,
            "parameters": event.parameters,
            "up": sum(move > 0 for move in moves.values()),
            "down": sum(move < 0 for move in moves.values()),
            "movers": [(name, *ranks[name]) for name in largest],
            "waiting": ", ".join(waits[:MOVERS]) + (f" and {more} more" if more > 0 else ""),
        }


def _reasons(run: RunFiles) -> Iterator[tuple[str, int, int, str]]:
    """Yield each layer's short name, first and last rank, and why; the largest change first."""
    if not run.events:
        return
    short, why = short_names(list(run.initial_ranks)), reasons(run.events)
    first, last = run.initial_ranks, run.final_ranks
    for name in sorted(why, key=lambda name: -abs(last[name] - first[name])):
        yield short[name], first[name], last[name], why[name]
