"""Draw the rank history in SVG: one row per layer, time from left to right."""

from collections.abc import Iterator, Mapping, Sequence

from dynlora.report.axes import Scale, event_marks, step_axis
from dynlora.report.blocks import block_of
from dynlora.report.markup import Node, append, figure, node
from dynlora.report.names import short_names
from dynlora.report.shades import Shades, paint
from dynlora.report.wording import shorten
from dynlora.types import Event

ROW = 17
"""Height of a layer's row, in pixels."""
BLOCK_GAP = 4
"""Space between two blocks."""
CHARACTER = 6.65
"""Width of a character of the names, in a monospaced font."""
DIGIT = 6.5
"""Width of a digit inside a row."""
LONGEST_NAME = 44
"""Maximum characters of a name; the row's title contains the full name."""
PLOT = 600
"""Width of the time axis."""
LEAST_SPELL = 0.03
"""Minimum width of the last ranks as a share of the run, so that a change in the last step is
visible."""
TOP = 56
"""Pixel of the first row, below the axis and the event numbers."""
ENDS = 76
"""Width of the column with the first and last ranks."""


def rank_map(
    events: Sequence[Event], initial: Mapping[str, int], *, steps: int, shades: Shades
) -> Node:
    """Draw each layer's rank over the steps of a run, as numbers and colours.

    Args:
        events: In order; may be empty.
        initial: Rank before the first event by module name; at least one.
        steps: Optimizer steps of the whole run.
        shades: Colour scale of rank changes.
    """
    names = {n: shorten(s, LONGEST_NAME) for n, s in short_names(list(initial)).items()}
    left = CHARACTER * max(map(len, names.values())) + 12
    tops = _row_tops(list(initial))
    bottom = max(tops.values()) + ROW + 2
    at = [event.step for event in events]
    time = Scale(
        0, max([1, steps, *(step + LEAST_SPELL * steps for step in at)]), left, left + PLOT
    )
    svg = figure(
        "Rank of each layer over the optimizer steps",
        f"{len(initial)} rows, one a layer, from the model's input to its output; the ranks are "
        "written in the rows, and at the right how each began and ended.",
        left + PLOT + ENDS,
        bottom + 26,
        "rank-map",
    )
    append(svg, step_axis(time, TOP - 22, offset=-8.0))
    for name in initial:
        append(
            svg, _row(name, names[name], tops[name], _spells(name, events, initial), time, shades)
        )
    append(svg, event_marks(at, time, TOP - 3, bottom))
    append(svg, step_axis(time, bottom + 2, offset=15.0))
    return svg


def _row_tops(names: Sequence[str]) -> dict[str, float]:
    """Return the upper pixel per row, with gaps between blocks."""
    tops: dict[str, float] = {}
    y, last = float(TOP), None
    for name in names:
        place = block_of(name)
        block = None if place is None else place[:2]
        y += BLOCK_GAP if tops and block != last else 0
        tops[name], last = y, block
        y += ROW
    return tops


def _spells(
    name: str, events: Sequence[Event], initial: Mapping[str, int]
) -> list[tuple[int, int]]:
    """Return a layer's ranks, each with the step from which it applies."""
    spells = [(0, initial[name])]
    for event in events:
        rank = event.layers[name].rank_after
        if rank != spells[-1][1]:
            spells.append((event.step, rank))
    return spells


def _row(
    name: str,
    short: str,
    top: float,
    spells: Sequence[tuple[int, int]],
    time: Scale,
    shades: Shades,
) -> Node:
    start, end = spells[0][1], spells[-1][1]
    told = ", ".join([f"rank {start}", *(f"{rank} from step {at}" for at, rank in spells[1:])])
    base = top + ROW - 5
    group = node("g", node("title", f"{name}: {told}"))
    append(group, node("text", short, class_="name", x=time.begin - 8, y=base, text_anchor="end"))
    for shape in _cells(top, spells, time, shades):
        append(group, shape)
    moved = f"{start} → {end}" if start != end else f"{end}"
    style = "ends" if start != end else "ends still"
    append(group, node("text", moved, class_=style, x=time.end + 10, y=base))
    return group


def _cells(
    top: float, spells: Sequence[tuple[int, int]], time: Scale, shades: Shades
) -> Iterator[Node]:
    start = spells[0][1]
    ends = [at for at, _ in spells[1:]] + [time.high]
    for (at, rank), until in zip(spells, ends, strict=True):
        x, width = time(at), time(until) - time(at)
        shape = paint(shades.strength(rank, start))
        yield node("rect", x=x, y=top, width=width, height=ROW - 1, class_="ground")
        yield node("rect", x=x, y=top, width=width, height=ROW - 1, **shape)
        if width >= DIGIT * len(str(rank)) + 7:
            yield node("text", str(rank), class_="n", x=x + 5, y=top + ROW - 5)
