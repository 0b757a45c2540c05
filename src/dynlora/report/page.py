"""Build the report of a run as one HTML page without scripts or external files."""

from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import yaml

from dynlora.report.curves import charts
from dynlora.report.diagram import Ranks, diagram
from dynlora.report.markup import Content, Node, append, node, to_html
from dynlora.report.rank_map import rank_map
from dynlora.report.shades import Shades, paint, shades_for
from dynlora.report.tables import cost_table, events_table, metrics_table, parameters_table
from dynlora.report.wording import count_text
from dynlora.runs.reader import RunFiles
from dynlora.types import moved, stillness

MARK = '<meta name="generator" content="dynlora report">'
"""Marks a file as a report, which a new report may replace."""
SOURCES = ("path", "name", "subset", "package", "gguf_file", "embedded")
"""Configuration keys that identify a model or a data set."""
SWATCHES = 7


def report_page(run: RunFiles) -> str:
    """Return the page as HTML.

    Args:
        run: Finished or unfinished.
    """
    pairs = [(run.final_ranks[name], start) for name, start in run.initial_ranks.items()]
    for event in run.events:
        pairs += [(e.rank_after, run.initial_ranks[name]) for name, e in event.layers.items()]
    shades = shades_for(pairs)
    body = node("main", _header(run), *_numbers(run), *_ranks(run, shades))
    for section in (*_curves(run), *_events(run), _configuration(run)):
        append(body, section)
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        MARK,
        '<meta name="color-scheme" content="light dark">',
        to_html(node("title", f"{run.root.resolve().name}: dynlora report")),
        f"<style>\n{files('dynlora.report').joinpath('page.css').read_text('utf-8')}</style>",
    ]
    start = '<!doctype html>\n<html lang="en">\n<head>\n'
    return start + "\n".join(head) + f"\n</head>\n<body>\n{to_html(body)}\n</body>\n</html>\n"


def _header(run: RunFiles) -> Node:
    facts = {
        "task": str(run.facts.get("task", "unknown")).replace("_", " "),
        "method": run.method,
        "model": _source(run.config.get("model")),
        "data": f"{_source(run.config.get('data'))}{_rows(run)}",
        "seed": "unknown" if run.seed is None else str(run.seed),
        "steps": count_text(run.steps),
        "written": run.written.replace("T", " ").replace("+00:00", " UTC"),
    }
    listed = node("dl")
    for name, value in facts.items():
        append(listed, node("div", node("dt", name), node("dd", value)))
    title = node(
        "h1", run.root.resolve().name, " ", node("span", run.status, class_=f"status {run.status}")
    )
    header = node("header", node("p", "dynlora report", class_="kicker"), title, listed)
    for note in run.notes:
        append(header, node("p", note, class_="note"))
    return header


def _source(section: Any) -> str:
    """Return the values of `SOURCES` in a section of the configuration."""
    if not isinstance(section, Mapping):
        return "unknown"
    given = [str(section[key]) for key in SOURCES if section.get(key) is not None]
    return ", ".join(given) or "unknown"


def _rows(run: RunFiles) -> str:
    counts = [f"{count_text(count)} {split}" for split, count in run.rows.items()]
    return f" ({', '.join(counts)} rows)" if counts else ""


def _section(title: str, *content: Content, hint: str = "") -> Node:
    section = node("section", node("h2", title))
    if hint:
        append(section, node("p", hint, class_="hint"))
    for item in content:
        append(section, item)
    return section


def _numbers(run: RunFiles) -> Iterator[Node]:
    tables = []
    if run.before or run.after:
        tables.append(metrics_table(run))
    if run.parameters or run.budget is not None:
        tables.append(parameters_table(run))
    if run.seconds or any(size is not None for size in run.memory.values()):
        tables.append(cost_table(run))
    if tables:
        yield _section("Before and after", node("div", *tables, class_="tables"))


def _ranks(run: RunFiles, shades: Shades) -> Iterator[Node]:
    if run.initial_ranks:
        drawing = rank_map(run.events, run.initial_ranks, steps=run.steps, shades=shades)
        yield _section(
            "Ranks while training",
            _legend(run, shades),
            node("div", drawing, class_="scroll"),
            hint=_told(run),
        )
    if run.final_ranks:
        ranks = Ranks(run.final_ranks, run.initial_ranks, shades)
        hint = "Bars are as long as ranks are high; a layer's whole name appears under the pointer."
        yield _section(
            "The model, layer by layer", node("div", diagram(ranks), class_="scroll"), hint=hint
        )


def _told(run: RunFiles) -> str:
    """Describe the rank map in one or two sentences."""
    still = stillness(run.events)
    if still is not None:
        return f"Ranks did not move: {still}."
    count = sum(moved(event) for event in run.events)
    return (
        f"Ranks moved at {count} of {len(run.events)} events, the dashed lines. The numbers in the "
        "rows are ranks; at the right stands how each layer began and ended."
    )


def _legend(run: RunFiles, shades: Shades) -> Node:
    """Return the colour scale, from the strongest decrease to the strongest increase."""
    starts = set(run.initial_ranks.values())
    start = f"rank at the start ({starts.pop()})" if len(starts) == 1 else "rank at the start"
    legend = node("p", f"÷ {shades.reach:.3g} or lower ", class_="scale")
    for place in range(-SWATCHES, SWATCHES + 1):
        swatch = node("svg", width=14, height=12, viewBox="0 0 14 12", aria_hidden="true")
        for style in ({"class_": "ground"}, paint(place / SWATCHES)):
            append(swatch, node("rect", width=14, height=12, **style))
        append(legend, swatch)
    append(legend, f" × {shades.reach:.3g} or higher; in the middle the {start}")
    return legend


def _curves(run: RunFiles) -> Iterator[Node]:
    names = list(dict.fromkeys([*run.before, *run.after]))
    drawn = charts(run.metrics, names, at=[event.step for event in run.events], steps=run.steps)
    if drawn:
        marked = "Dashed lines are events. " if run.events else ""
        hint = f"{marked}The horizontal axis is optimizer steps."
        yield _section("Loss and metrics", node("div", *drawn, class_="charts"), hint=hint)


def _events(run: RunFiles) -> Iterator[Node]:
    if run.events:
        hint = (
            "Agreement says how far consecutive gradients agree, in standard errors; layers are "
            "scored from 2.5 on. A layer waits where losing rank would cost it too much output."
        )
        yield _section("Events", events_table(run), hint=hint)


def _configuration(run: RunFiles) -> Node:
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
    details = node("details", node("summary", "All settings"), node("pre", text))
    section = _section("Configuration", details)
    made = {key: run.facts[key] for key in ("versions", "machine") if key in run.facts}
    if made:
        told = yaml.safe_dump(made, sort_keys=False, allow_unicode=True)
        append(section, node("details", node("summary", "Versions and machine"), node("pre", told)))
    return section
