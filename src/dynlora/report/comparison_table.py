"""Terminal output of a comparison: metrics, ranks and settings side by side, warnings last."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dynlora.report.comparison import Comparison, shown
from dynlora.report.names import short_names
from dynlora.report.wording import (
    bytes_text,
    change_text,
    count_text,
    metric_text,
    seconds_text,
)

LAYERS = 10
"""Maximum number of layers in the table of ranks; `--json` lists all."""


def comparison_table(found: Comparison) -> RenderableType:
    """Return the comparison as tables to print."""
    parts: list[RenderableType] = [*_figures(found)]
    differing = [layer for layer in found.layers if layer.difference][:LAYERS]
    if differing:
        short = short_names([layer.name for layer in found.layers])
        rows = {short[layer.name]: [_rank(rank) for rank in layer.ranks] for layer in differing}
        count = sum(layer.difference > 0 for layer in found.layers)
        title = f"ranks that differ most, {len(differing)} of {count} layers"
        parts += _table(title, found.labels, [list(rows.items())])
    elif found.layers:
        parts.append(Text("no layer that two runs share has another rank"))
    if found.settings:
        settings = {key: [*map(shown, values)] for key, values in found.settings.items()}
        parts += _table("settings that differ", found.labels, [list(settings.items())])
    parts += [Text(f"not comparable, {warning}", style="yellow") for warning in found.warnings]
    return Group(*parts)


def _table(
    title: str,
    labels: Sequence[str],
    sections: Sequence[Sequence[tuple[str, Sequence[str]]]],
) -> tuple[Text, Table]:
    """Return a heading and a table; unlike a table's title, the heading may be wider."""
    table = Table()
    table.add_column(style="bold", overflow="fold")
    for label in labels:
        table.add_column(Text(label), justify="right", overflow="fold")
    for rows in sections:
        for name, cells in rows:
            table.add_row(Text(name), *map(Text, cells))
        table.add_section()
    return Text(title, style="italic"), table


def _figures(found: Comparison) -> tuple[Text, Table]:
    runs = found.runs
    what = [
        ("method", [run.method for run in runs]),
        ("seed", [shown(run.seed) for run in runs]),
        ("steps", [count_text(run.steps) for run in runs]),
    ]
    sections = (what, _metrics(found), _parameters(found), _costs(found))
    return _table("dynlora compare", found.labels, [list(rows) for rows in sections])


def _metrics(found: Comparison) -> Iterator[tuple[str, list[str]]]:
    for name in dict.fromkeys(name for run in found.runs for name in run.after):
        yield f"{name} before", [_metric(run.before, name) for run in found.runs]
        first = found.runs[0].after.get(name)
        cells = [_metric(run.after, name) for run in found.runs]
        gaps = [change_text(first, run.after.get(name)) for run in found.runs[1:]]
        yield (
            f"{name} after",
            cells[:1] + [_with(*pair) for pair in zip(cells[1:], gaps, strict=True)],
        )


def _parameters(found: Comparison) -> Iterator[tuple[str, list[str]]]:
    yield "budget", [count_text(run.budget) for run in found.runs]
    for key, name in (("end", "parameters"), ("peak", "at their peak")):
        yield name, [count_text(run.parameters.get(key)) for run in found.runs]


def _costs(found: Comparison) -> Iterator[tuple[str, list[str]]]:
    for key in dict.fromkeys(key for run in found.runs for key in run.seconds):
        yield key.replace("_", " "), [seconds_text(run.seconds.get(key)) for run in found.runs]
    for key in found.runs[0].memory:
        sizes = [run.memory.get(key) for run in found.runs]
        if any(size is not None for size in sizes):
            name = key.removesuffix("_bytes").replace("_", " ")
            yield name, [bytes_text(size) for size in sizes]


def _metric(values: Mapping[str, float | None], name: str) -> str:
    return metric_text(values[name]) if name in values else "–"


def _with(value: str, gap: str) -> str:
    return f"{value} ({gap})" if gap else value


def _rank(rank: int | None) -> str:
    return "–" if rank is None else str(rank)
