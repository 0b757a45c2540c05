"""Plot the rank history as a PNG heat map: one row per layer, time from left to right.

The figure does not use pyplot, so matplotlib's global state does not change.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from dynlora.report.names import short_names
from dynlora.types import Event, moved

ROW_INCHES = 0.17
"""Height of a layer's row, enough for a 7-point label."""
FRAME_INCHES = 1.6
"""Height of title and time axis."""
MAX_INCHES = 60.0
"""Maximum height of the figure; with more layers, rows are thinner and only some are labelled."""
COLOURS = "PuOr_r"
"""Diverging colour map with a white middle, readable with colour blindness."""
REACH = (1.5, 3.0)
"""Minimum and maximum ratio to the start rank at the ends of the colour scale. The maximum keeps
smaller changes visible when one layer grows tenfold."""
MAX_TICKS = 12
"""Maximum number of ranks labelled on the colour bar."""


def write_heatmap(
    events: Sequence[Event],
    path: Path,
    *,
    initial: Mapping[str, int],
    budget: int,
    steps: int,
) -> None:
    """Plot each layer's rank over the steps of a run.

    White is the median rank at the start. Colours show the ratio to it on a log scale, so 8 → 16
    looks as strong as 8 → 4. Dashed lines are events; first and last ranks are beside the rows.

    Args:
        events: In order; may be empty.
        path: PNG file to write.
        initial: Rank before the first event by module name; at least one.
        budget: Maximum number of LoRA parameters, for the title.
        steps: Optimizer steps of the whole run, at least 1.
    """
    ranks = rank_table(events, initial)
    height = min(MAX_INCHES, FRAME_INCHES + ROW_INCHES * len(initial))
    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    low, high = colour_range(ranks)
    norm = LogNorm(vmin=low, vmax=high)
    mesh = axes.pcolormesh(
        time_edges(events, steps), np.arange(len(initial) + 1), ranks, cmap=COLOURS, norm=norm
    )
    for event in events:
        axes.axvline(event.step, color="0.35", linewidth=0.8, linestyle=(0, (4, 3)))
    every = -(-len(initial) // int((height - FRAME_INCHES) / (0.9 * ROW_INCHES) + 1))
    _label_rows(axes, initial, ranks, every)
    axes.set_xlabel("optimizer step")
    axes.set_title(_title(events, initial, budget), fontsize=10)
    _draw_scale(figure, axes, mesh, ranks)
    figure.savefig(path, format="png", dpi=120)


def rank_table(events: Sequence[Event], initial: Mapping[str, int]) -> np.ndarray:
    """Return ranks of shape ``(layers, events + 1)``: at the start and after each event."""
    columns = [list(initial.values())]
    for event in events:
        columns.append([event.layers[name].rank_after for name in initial])
    return np.array(columns).T


def time_edges(events: Sequence[Event], steps: int) -> np.ndarray:
    """Return the steps at the column edges; the last column is at least 2 % of the run wide.

    The minimum width keeps an event after the last step visible.
    """
    begins = [0, *(event.step for event in events)]
    return np.array([*begins, max(steps, begins[-1] + max(1, round(0.02 * steps)))])


def colour_range(ranks: np.ndarray) -> tuple[float, float]:
    """Return the lowest and highest rank of the colour scale.

    Their geometric mean, drawn in white, is the median rank at the start.

    Args:
        ranks: Shape ``(layers, events + 1)``.
    """
    start = float(median(ranks[:, 0]))
    least, most = REACH
    reach = min(max(least, ranks.max() / start, start / ranks.min()), most)
    return start / reach, start * reach


def _draw_scale(figure: Figure, axes: Axes, mesh: QuadMesh, ranks: np.ndarray) -> None:
    """Draw the colour bar, with pointed ends where ranks exceed the scale."""
    low, high = colour_range(ranks)
    beyond = (bool(ranks.min() < low), bool(ranks.max() > high))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}
    bar = figure.colorbar(
        mesh, ax=axes, label="rank", fraction=0.04, pad=0.02, extend=extend.get(beyond, "both")
    )
    whole, start = range(max(1, math.ceil(low)), int(high) + 1), int(median(ranks[:, 0]))
    every = -(-len(whole) // MAX_TICKS)
    ticks = [rank for rank in whole if (rank - start) % every == 0]
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter("{x:.0f}")


def _label_rows(axes: Axes, initial: Mapping[str, int], ranks: np.ndarray, every: int) -> None:
    """Label rows with layer names on the left and first and last rank on the right."""
    middles = np.arange(len(initial))[::every] + 0.5
    axes.set_yticks(middles, list(short_names(list(initial)).values())[::every], fontsize=7)
    axes.set_ylim(len(initial), 0)
    ends = axes.secondary_yaxis("right")
    texts = [
        f"{row[0]} → {row[-1]}" if row[0] != row[-1] else f"{row[0]}" for row in ranks[::every]
    ]
    ends.set_yticks(middles, texts, fontsize=7)
    axes.tick_params(axis="y", length=0)
    ends.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _title(events: Sequence[Event], initial: Mapping[str, int], budget: int) -> str:
    low, high = min(initial.values()), max(initial.values())
    start = f"{low}" if low == high else f"{low} to {high}"
    count = sum(moved(event) for event in events)
    told = f"ranks moved at {count} of {len(events)} events (dashed)" if events else "no events"
    return (
        "Rank of each LoRA layer while training\n"
        f"at the start {start} (white); {told}; budget {budget:,} parameters"
    )
