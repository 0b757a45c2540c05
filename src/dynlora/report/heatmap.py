"""The rank history as a picture: events in, a PNG with one row a layer and time from left to right.

Drawn on a figure of its own, without pyplot, so that no global state of matplotlib changes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynlora.report.names import short_names
from dynlora.types import Event

ROW_INCHES = 0.17
"""Height of a layer's row; a label of 7 points fits."""
MAX_INCHES = 60.0
"""Highest figure; beyond it rows become thinner and only some are labelled."""


def write_heatmap(
    events: Sequence[Event],
    path: Path,
    *,
    initial: Mapping[str, int],
    budget: int,
    steps: int,
) -> None:
    """Draw each layer's rank over the steps of a run.

    Args:
        events: In the order in which they happened; may be empty.
        path: PNG file to write.
        initial: Rank of each layer before the first event, by module name.
        budget: Parameters that all layers together may hold; named in the title.
        steps: Optimizer steps of the whole run, at least 1.
    """
    ranks = _rank_table(events, initial)
    edges = [0, *(event.step for event in events), max(steps, 1)]
    height = min(MAX_INCHES, 1.6 + ROW_INCHES * len(initial))
    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # cividis looks the same with and without colour blindness, and survives a grey print.
    mesh = axes.pcolormesh(np.array(edges), np.arange(len(initial) + 1), ranks, cmap="cividis")
    labels = list(short_names(list(initial)).values())
    every = -(-len(labels) // int((height - 1.6) / (0.9 * ROW_INCHES) + 1))
    axes.set_yticks(np.arange(len(labels))[::every] + 0.5, labels[::every], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    axes.set_title(
        f"Rank of each LoRA layer: {len(events)} events, budget {budget:,} parameters", fontsize=10
    )
    bar = figure.colorbar(mesh, ax=axes, label="rank", fraction=0.04, pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, format="png", dpi=120)


def _rank_table(events: Sequence[Event], initial: Mapping[str, int]) -> "np.ndarray":
    """Return ranks of shape ``(layers, events + 1)``."""
    columns = [list(initial.values())]
    for event in events:
        columns.append([event.layers[name].rank_after for name in initial])
    return np.array(columns).T
