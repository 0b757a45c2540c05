"""How every figure looks, and how it becomes the same bytes of SVG each time."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

MARK = "python -m benchmarks report"
"""Stands in each figure's metadata, so that no other file is ever replaced."""
COLOURS = (
    "#332288", "#CC6677", "#117733", "#88CCEE", "#DDAA33",
    "#882255", "#44AA99", "#AA4499", "#999933",
)  # fmt: skip
"""Paul Tol's muted scheme, told apart with and without colour blindness; its sand is darkened."""
REFERENCE_COLOUR = "#333333"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""As many as let 63 methods differ in colour or marker."""
GREY = "0.35"
SETTINGS = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": "0.15",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ("DejaVu Sans",),
    "font.size": 8.5,
    "grid.color": "0.9",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.markeredgewidth": 0.9,
    "svg.fonttype": "none",
    "svg.hashsalt": "dynlora",
    "text.parse_math": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with our settings alone, whatever matplotlib is set to; its own come back after."""
    with mpl.rc_context(), warnings.catch_warnings():
        # Text stays text in the file, so a reader's font may have what ours lacks.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        yield


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, which is part of no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG without a date."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Source": MARK})
    return file.getvalue()


def look(methods: Sequence[str], reference: str) -> dict[str, dict[str, Any]]:
    """Return colour and marker of each method; the reference is dark grey."""
    others = [method for method in methods if method != reference]
    looks = {
        method: {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[(n + 1) % len(MARKERS)]}
        for n, method in enumerate(others)
    }
    return looks | {reference: {"color": REFERENCE_COLOUR, "marker": MARKERS[0]}}


def axis_label(axes: Axes, x: str, y: str) -> None:
    """Name both axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
