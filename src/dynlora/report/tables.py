"""HTML tables of a report: metrics, parameters, time and memory, and events."""

from collections.abc import Iterator, Mapping, Sequence

from dynlora.report.markup import Content, Node, append, node
from dynlora.report.names import short_names
from dynlora.report.wording import (
    bytes_text,
    change_text,
    count_text,
    listing,
    metric_text,
    seconds_text,
    share_text,
    verdict,
)
from dynlora.runs.reader import RunFiles
from dynlora.types import Event

MOVERS = 3
"""Maximum number of layers listed per event."""


def table(heads: Sequence[str], rows: Sequence[Sequence[Content]], *, words: Sequence[int]) -> Node:
    """Return a table whose first column contains row headings.

    Args:
        heads: Column headings.
        rows: Cells per row.
        words: Indices of text columns, aligned left; all others contain numbers.
    """
    style = {n: {} if n in words else {"class_": "number"} for n in range(len(heads))}
    head = node("tr", *(node("th", h, scope="col", **style[n]) for n, h in enumerate(heads)))
    body = node("tbody")
    for first, *rest in rows:
        cells = [node("td", cell, **style[n]) for n, cell in enumerate(rest, start=1)]
        append(body, node("tr", node("th", first, scope="row", **style[0]), *cells))
    return node("div", node("table", node("thead", head), body), class_="scroll")


def metrics_table(run: RunFiles) -> Node:
    """Return a table of the validation metrics before and after training."""
    rows: list[list[Content]] = []
    for name in dict.fromkeys([*run.before, *run.after]):
        before, after = run.before.get(name), run.after.get(name)
        better = verdict(name, before, after)
        rows.append(
            [
                name,
                metric_text(before) if name in run.before else "–",
                metric_text(after) if name in run.after else "–",
                change_text(before, after),
                node("span", better, class_=better),
            ]
        )
    heads = ["validation metric", "before", "after", "change", ""]
    return table(heads, rows, words=[0, 4])


def parameters_table(run: RunFiles) -> Node:
    """Return a table of the parameters in use and the budget, with bars."""
    widest = max([1, run.budget or 0, *(value or 0 for value in run.parameters.values())])
    budget = {} if run.budget is None else {"budget": run.budget}
    rows: list[list[Content]] = []
    for name, value in [*run.parameters.items(), *budget.items()]:
        share = f"width: {100 * (value or 0) / widest:.1f}%"
        bar = node("span", node("span", style=share), class_="bar")
        rows.append([name, count_text(value), share_text(value, run.budget), bar])
    return table(["parameters", "count", "of budget", ""], rows, words=[0, 3])


def cost_table(run: RunFiles) -> Node:
    """Return a table of seconds per activity and peak memory."""
    whole = run.seconds.get("training_steps")
    rows: list[list[Content]] = []
    for name, value in run.seconds.items():
        if name == "dynamic_part" and not run.initial_ranks:
            continue
        part = share_text(value, whole) if name == "dynamic_part" else ""
        rows.append([name.replace("_", " "), seconds_text(value), part])
    for name, size in run.memory.items():
        if size is not None:
            rows.append([name.removesuffix("_bytes").replace("_", " "), bytes_text(size), ""])
    return table(["time and memory", "", "of training steps"], rows, words=[0])


def events_table(run: RunFiles) -> Node:
    """Return a table with a row per event: step, agreement, parameters and changed ranks."""
    short = short_names(list(run.initial_ranks))
    heads = [
        "#",
        "step",
        "agreement",
        "parameters",
        "of budget",
        "up",
        "down",
        "moved most",
        "waiting",
    ]
    rows: list[list[Content]] = []
    for number, event in enumerate(run.events, start=1):
        moves = {n: e.rank_after - e.rank_before for n, e in event.layers.items()}
        waits = [short[name] for name, layer in event.layers.items() if layer.waits]
        rows.append(
            [
                str(number),
                count_text(event.step),
                f"{event.agreement:.2f}",
                count_text(event.parameters),
                share_text(event.parameters, run.budget),
                str(sum(move > 0 for move in moves.values())),
                str(sum(move < 0 for move in moves.values())),
                _movers(event, moves, short),
                listing(waits, MOVERS) or "none",
            ]
        )
    return table(heads, rows, words=[7, 8])


def _movers(event: Event, moves: Mapping[str, int], short: Mapping[str, str]) -> Node:
    names = [name for name in sorted(moves, key=lambda n: -abs(moves[n])) if moves[name]][:MOVERS]
    cell = node("span", *_moved_lines(names, event, short))
    if not names:
        append(cell, "nothing moved")
    return cell


def _moved_lines(names: Sequence[str], event: Event, short: Mapping[str, str]) -> Iterator[Node]:
    for name in names:
        layer = event.layers[name]
        yield node("span", f"{short[name]} {layer.rank_before} → {layer.rank_after}", class_="move")
