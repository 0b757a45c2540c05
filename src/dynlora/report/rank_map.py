"""Draw the rank history: one row per layer, time from left to right."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

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
AXIS, EVENT_NUMBERS = 22, 4  # heights above the rows
HEADING = (24, 42, 48)  # the lines' places and the whole height of the heading of a picture
TICKS = 6  # most numbers of the axes of steps
Bars = Sequence[tuple[float, float, int]]  # left end, right end and rank


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
    heading: Sequence[str] = (),
    width: int = PLOT,
) -> svg.Drawing:
    """Draw each layer's rank over the steps of a run, as numbers and colours.

    There must be at least one layer, but there may be no events. `steps` is for the whole run,
    `heading` up to two lines, and `width` of the axis of steps.
    """
    names = {
        name: shorten(svg.drawable(short), LONGEST_NAME)
        for name, short in short_names(list(initial)).items()
    }
    row = min(ROW, TALLEST / len(initial))
    left = CHARACTER * max(map(len, names.values())) + 12
    above = ABOVE + (HEADING[-1] if heading else 0)
    tops = {name: above + top for name, top in _tops(list(initial), row).items()}
    bottom = max(tops.values()) + row
    at = [event.step for event in events]
    end = max([1, steps, *(step + LEAST_SPELL * steps for step in at)])

    def pixel(step: float) -> float:
        return left + width * step / end

    labelled = math.ceil(LABEL / row)  # of so many rows, the first has texts
    shapes: list[str] = []
    for number, (name, top) in enumerate(tops.items()):
        ranks = [(0, initial[name]), *((e.step, e.layers[name].rank_after) for e in events)]
        spells = [next(equal) for _, equal in groupby(ranks, key=itemgetter(1))]
        places = [*(pixel(step) for step, _ in spells), left + width]
        later = "".join(f", {rank} from step {step}" for step, rank in spells[1:])
        told = svg.drawable(f"{name}: rank {initial[name]}{later}")
        label = names[name] if number % labelled == 0 else None
        shapes += [f"<g><title>{escape(told)}</title>"]
        bars = [(*ends, rank) for ends, (_, rank) in zip(pairwise(places), spells, strict=True)]
        shapes += [*_row(bars, top, row, scale, label), "</g>"]
    ticks = svg.ticks(0, end, math.ceil(TICKS * width / PLOT), whole=True)
    for y in (above - AXIS, bottom + BELOW - 10):
        shapes += [svg.text(pixel(step), y, f"{step:,.0f}", "soft", "middle") for step in ticks]
    shapes += svg.event_marks(map(pixel, at), above, bottom, above - EVENT_NUMBERS)
    shapes += [svg.text(left, y, line) for y, line in zip(HEADING, heading, strict=False)]
    return svg.Drawing(
        left + width + ENDS,
        bottom + BELOW,
        "Rank of each layer over the optimizer steps",
        f"{len(initial)} rows, one per layer, from the model's input to its output. The rows "
        "contain the ranks; the first and last rank are at the right.",
        shapes,
    )


def write_rank_map(
    events: Sequence[Event], path: Path, *, initial: Mapping[str, int], budget: int, steps: int
) -> None:
    """Write the rank history as a PNG picture; its heading contains the `budget` in parameters."""
    count = sum(map(moved, events))
    told = f"ranks moved at {count} of {len(events)} events (dashed)" if events else "no events"
    scale = scale_of(events, initial, initial)
    heading = (
        f"Rank of each LoRA layer by optimizer step; budget {budget:,} parameters",
        f"{told}; orange gained rank, up to × {scale.reach:.3g} at full colour; violet lost rank",
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


def _row(
    bars: Bars, top: float, row: float, scale: svg.RankScale, label: str | None
) -> Iterator[str]:
    """Yield a layer's ranks as bars on a neutral row; with a label, also as numbers with room."""
    height, base = row - min(1.0, 0.1 * row), top + 0.7 * row
    (left, _, first), (_, right, last) = bars[0], bars[-1]
    yield svg.bar(left, top, right - left, height, "ground")
    for x, end, rank in bars:
        strength = scale.strength(rank, first)
        if strength:
            side = "up" if strength > 0 else "down"
            yield svg.bar(x, top, end - x, height, side, abs(strength))
        if label is not None and end - x >= DIGIT * len(str(rank)) + 7:
            yield svg.text(x + 5, base, str(rank))
    if label is not None:
        told, colour = (str(last), "soft") if first == last else (f"{first} → {last}", "ink")
        yield svg.text(left - 8, base, label, anchor="end", style=svg.MONO)
        yield svg.text(right + 10, base, told, colour)
