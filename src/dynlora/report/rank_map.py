"""Draw the rank history: one row per layer, time from left to right."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from dynlora.history import Event, moved
from dynlora.layer_names import block_of, short_names
from dynlora.report import svg
from dynlora.report.wording import shorten

# All sizes are in pixels.
ROW = 17.0  # maximum height of a layer's row
TALLEST = 8_000.0  # approximate maximum height of all rows; with many layers, rows are thinner
LABEL = 11.0  # minimum height per row with text; of thinner rows only some have text
BLOCK_GAP = 4.0  # between two blocks
CHARACTER, DIGIT = 7, 6.5  # widths of a character of the names and of a digit inside a row
LONGEST_NAME = 44  # characters; the row's tooltip contains the full name
PLOT = 600  # width of the time axis
LEAST_SPELL = 0.03  # minimum share of the axis for the last ranks, to show a change at the end
ABOVE, BELOW, ENDS = 44, 26, 76  # for the axes and the column with the first and last ranks
EVENT_NUMBERS, HEADING = 17, 48  # for the numbers of the events and the heading of a picture
Spells = Sequence[tuple[int, int]]  # (step, rank) pairs: each rank with its first step


def scale_of(
    events: Sequence[Event], initial: Mapping[str, int], final: Mapping[str, int]
) -> svg.RankScale:
    """Return the colour scale that covers the initial, all later and the final ranks."""
    later = [(x.rank_after, initial[name]) for e in events for name, x in e.layers.items()]
    return svg.rank_scale([*later, *((final[name], start) for name, start in initial.items())])


def rank_map(
    events: Sequence[Event],
    initial: Mapping[str, int],
    *,
    steps: int,
    scale: svg.RankScale,
    heading: str = "",
) -> svg.Drawing:
    """Draw each layer's rank over the steps of a run, as numbers and colours.

    There must be at least one layer, but there may be no events. `steps` is for the whole run.
    """
    names = {
        name: shorten(svg.drawable(short), LONGEST_NAME)
        for name, short in short_names(list(initial)).items()
    }
    spells = {name: _spells(name, events, initial[name]) for name in initial}
    row = min(ROW, TALLEST / len(initial))
    tops = _tops(list(initial), row)
    height = max(tops.values()) + row
    left = CHARACTER * max(map(len, names.values())) + 12
    above = ABOVE + (HEADING if heading else 0)
    at = [event.step for event in events]
    end = max([1, steps, *(step + LEAST_SPELL * steps for step in at)])
    with svg.drawing_style():
        box = (left, above, left + PLOT, above + height)
        figure, axes = svg.blank(left + PLOT + ENDS, above + height + BELOW, box)
        axes.set(xlim=(0, end), ylim=(height, 0), yticks=[])
        _draw_time(axes, 1 + EVENT_NUMBERS / height)
        for number, name in enumerate(initial):
            _draw_colours(axes, f"row-{number}", tops[name], row, spells[name], scale)
            if number % math.ceil(LABEL / row) == 0:
                _draw_texts(axes, tops[name] + 0.7 * row, names[name], spells[name])
        svg.mark_events(axes, at, -4)
        if heading:
            axes.text(0, -ABOVE - 8, heading, fontsize=12, linespacing=1.5)
    return svg.Drawing(
        figure,
        "Rank of each layer over the optimizer steps",
        f"{len(initial)} rows, one per layer, from the model's input to its output. The rows "
        "contain the ranks; the first and last rank are at the right.",
        {f"row-{number}": _told(name, spells[name]) for number, name in enumerate(initial)},
    )


def write_rank_map(
    events: Sequence[Event],
    path: Path,
    *,
    initial: Mapping[str, int],
    budget: int,
    steps: int,
) -> None:
    """Write the rank history as a PNG picture; its heading contains the `budget` in parameters."""
    count = sum(map(moved, events))
    told = f"ranks moved at {count} of {len(events)} events (dashed)" if events else "no events"
    scale = scale_of(events, initial, initial)
    heading = (
        f"Rank of each LoRA layer by optimizer step; budget {budget:,} parameters\n"
        f"{told}; orange gained rank, up to × {scale.reach:.3g} at full colour; violet lost rank"
    )
    svg.write_png(rank_map(events, initial, steps=steps, scale=scale, heading=heading), path)


def _tops(names: Sequence[str], row: float) -> dict[str, float]:
    """Return the upper pixel per row, with gaps between blocks."""
    tops: dict[str, float] = {}
    top, last = 0.0, None
    for name in names:
        place = block_of(name)
        block = None if place is None else place[:2]
        top += BLOCK_GAP if tops and block != last else 0.0
        tops[name], last = top, block
        top += row
    return tops


def _spells(name: str, events: Sequence[Event], start: int) -> Spells:
    spells = [(0, start)]
    for event in events:
        rank = event.layers[name].rank_after
        if rank != spells[-1][1]:
            spells.append((event.step, rank))
    return spells


def _told(name: str, spells: Spells) -> str:
    later = (f", {rank} from step {step}" for step, rank in spells[1:])
    return f"{name}: rank {spells[0][1]}{''.join(later)}"


def _draw_time(axes: Axes, top: float) -> None:
    """Draw the axis of steps below the rows and again at `top`, a share of the axes' height."""
    for axis in (axes, axes.secondary_xaxis(top)):
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.patch.set_visible(False)
        axis.tick_params(length=0, labelcolor=svg.LIGHT["soft"], labelsize=11)
        axis.spines[:].set_color(svg.LIGHT["soft"])
    axes.spines["bottom"].set_visible(True)


def _until(spells: Spells, end: float) -> Iterator[tuple[int, int, float]]:
    """Yield each rank's first step, the rank, and the step of the next rank."""
    ends = [*(step for step, _ in spells[1:]), end]
    for (begin, rank), until in zip(spells, ends, strict=True):
        yield begin, rank, until


def _draw_colours(
    axes: Axes, gid: str, top: float, row: float, spells: Spells, scale: svg.RankScale
) -> None:
    """Draw a layer's ranks as coloured rectangles on a neutral row."""
    start, end = spells[0][1], axes.get_xlim()[1]
    colours = [(0.0, end, to_rgba(svg.LIGHT["ground"]))]
    for begin, rank, until in _until(spells, end):
        strength = scale.strength(rank, start)
        if strength:
            side = "up" if strength > 0 else "down"
            colours.append((begin, until, to_rgba(svg.LIGHT[side], abs(strength))))
    bottom = top + row - min(1.0, 0.1 * row)
    shapes = [[(b, top), (e, top), (e, bottom), (b, bottom)] for b, e, _ in colours]
    faces = [colour for *_, colour in colours]
    axes.add_collection(
        PolyCollection(shapes, facecolors=faces, linewidths=0, gid=gid, clip_on=False)
    )


def _draw_texts(axes: Axes, base: float, name: str, spells: Spells) -> None:
    """Write a layer's name, its ranks where there is room, and its first and last rank."""
    end = axes.get_xlim()[1]
    pixel = end / PLOT
    axes.text(-8 * pixel, base, name, ha="right", fontsize=11, family=svg.MONO)
    for begin, rank, until in _until(spells, end):
        if until - begin >= pixel * (DIGIT * len(str(rank)) + 7):
            axes.text(begin + 5 * pixel, base, str(rank), fontsize=11)
    first, last = spells[0][1], spells[-1][1]
    if first == last:
        axes.text(end + 10 * pixel, base, str(last), fontsize=11, color=svg.LIGHT["soft"])
    else:
        axes.text(end + 10 * pixel, base, f"{first} → {last}", fontsize=11)
