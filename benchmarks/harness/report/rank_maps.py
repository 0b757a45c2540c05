"""Figure: mean final rank per layer, by block and kind, one panel per method and budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from benchmarks.harness.report.results import Cell, Scores, StudyResults
from benchmarks.harness.report.style import GREY, blank, drawing, svg
from dynlora.layer_names import block_of

CELL_WIDTH, CELL_HEIGHT = 0.42, 0.21
"""Inches per layer."""
LETTER = 0.08
"""Inches per character of a name."""
COLOURS = "PuOr_r"
"""Diverging colour map with a white middle, readable with colour blindness."""
REACH = 3.0
"""Ratio to the mean rank at full colour."""
TINY = 1e-9
"""Replaces a rank of 0 in ratios."""
STRONG = 0.6
"""Share of the colour scale from which digits are white."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A method's mean ranks in one cell."""

    cell: Cell
    method: str
    ranks: Mapping[str, float]
    """Mean final rank by module name."""

    @property
    def title(self) -> str:
        """Title of the panel."""
        return f"{self.method}, budget {self.cell.budget:,}"

    @property
    def decimals(self) -> int:
        """Number of decimals: 0 if all ranks are whole, else 1."""
        return 0 if all(rank == round(rank) for rank in self.ranks.values()) else 1

    @property
    def level(self) -> float:
        """Mean rank of all layers, above 0 so that ratios to it exist."""
        return max(fmean(self.ranks.values()), TINY)


@dataclass(frozen=True, slots=True)
class Layout:
    """Position of each layer in every panel."""

    rows: Mapping[tuple[str, int], int]
    """Row by prefix and block number; -1 for layers outside blocks."""
    columns: Mapping[str, int]
    """Column by kind."""

    def labels(self) -> list[str]:
        """Return a label per row: the block number, with its prefix if there are several."""
        prefixes = {prefix for prefix, number in self.rows if number >= 0}
        own = [prefix.rpartition(".")[2] if len(prefixes) > 1 else "" for prefix, _ in self.rows]
        return [
            f"{name} {number}".strip() if number >= 0 else "–"
            for name, (_, number) in zip(own, self.rows, strict=True)
        ]


def moved_patterns(study: StudyResults, setting: tuple[str, str], reference: str) -> list[Pattern]:
    """Return the patterns of methods whose ranks differ between layers in any run."""
    patterns = []
    for method in study.methods(first=reference):
        runs = {
            cell: [run for run in study.usable(cell, method).values() if run.final_ranks]
            for cell in study.budgets(setting)
        }
        if any(len(set(run.final_ranks.values())) > 1 for found in runs.values() for run in found):
            patterns += [_pattern(c, method, found) for c, found in runs.items() if found]
    return patterns


def _pattern(cell: Cell, method: str, runs: Sequence[Scores]) -> Pattern:
    by_name: dict[str, list[int]] = {}
    for run in runs:
        for name, rank in run.final_ranks.items():
            by_name.setdefault(name, []).append(rank)
    ranks = {name: fmean(found) for name, found in by_name.items()}
    return Pattern(cell, method, ranks)


def rank_figure(patterns: Sequence[Pattern]) -> bytes:
    """Draw a panel per pattern as SVG, with methods as rows and budgets as columns.

    Args:
        patterns: Patterns of one model and task; at least one.
    """
    places = arrange([*dict.fromkeys(name for pattern in patterns for name in pattern.ranks)])
    methods = list(dict.fromkeys(pattern.method for pattern in patterns))
    cells = sorted({pattern.cell for pattern in patterns})
    names = LETTER * max(map(len, places.columns))
    beside = 0.3 + LETTER * max(map(len, places.labels()))
    panel = max(CELL_WIDTH * len(places.columns), LETTER * max(len(p.title) for p in patterns))
    width = beside + len(cells) * (0.3 + panel)
    height = names + 0.2 + len(methods) * (0.4 + CELL_HEIGHT * len(places.rows))
    with drawing():
        figure = blank(max(width, 4.0), height)
        grid = figure.subplots(len(methods), len(cells), sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for pattern in patterns:
            axes = grid[methods.index(pattern.method), cells.index(pattern.cell)]
            axes.set_axis_on()
            _panel(axes, pattern, places)
        return svg(figure)


def arrange(names: Sequence[str]) -> Layout:
    """Return the layout: blocks by number as rows, kinds in order of appearance as columns."""
    found = [(block_of(name), name) for name in names]
    blocks = {(cut[0], int(cut[1])) for cut, _ in found if cut}
    loose = [name for cut, name in found if not cut]
    kinds = dict.fromkeys([*(cut[2] for cut, _ in found if cut), *loose])
    rows = [*sorted(blocks), *([("", -1)] if loose else [])]
    return Layout(
        {key: place for place, key in enumerate(rows)},
        {kind: place for place, kind in enumerate(kinds)},
    )


def _panel(axes: Axes, pattern: Pattern, places: Layout) -> None:
    values = np.full((len(places.rows), len(places.columns)), np.nan)
    for name, rank in pattern.ranks.items():
        cut = block_of(name)
        row, column = ((cut[0], int(cut[1])), cut[2]) if cut else (("", -1), name)
        values[places.rows[row], places.columns[column]] = rank
    level = pattern.level
    norm = LogNorm(vmin=level / REACH, vmax=level * REACH)
    # A rank of 0, which a log scale cannot show, gets the lowest colour.
    shown = np.ma.masked_invalid(values.clip(min=level / REACH))
    axes.pcolormesh(shown, cmap=COLOURS, norm=norm, edgecolors="white")
    for (row, column), rank in np.ndenumerate(values):
        if np.isfinite(rank):
            strong = abs(log(max(rank, TINY) / level)) > STRONG * log(REACH)
            colour = "white" if strong else "black"
            place = (column + 0.5, row + 0.5)
            text = axes.text(
                *place,
                f"{rank:.{pattern.decimals}f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color=colour,
            )
            text.set_in_layout(False)  # speeds up the layout of many cells
    axes.set_title(pattern.title, color=GREY)
    _name_fields(axes, places)


def _name_fields(axes: Axes, places: Layout) -> None:
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7.5)
    axes.set_ylim(len(places.rows), 0)
    axes.xaxis.set_major_locator(FixedLocator([n + 0.5 for n in range(len(places.columns))]))
    axes.yaxis.set_major_locator(FixedLocator([n + 0.5 for n in range(len(places.rows))]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticklabels(list(places.columns), rotation=90)
    axes.set_yticklabels(places.labels())
