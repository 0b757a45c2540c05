"""Common style of all figures, and their conversion to reproducible SVG."""

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
"""Metadata of each figure, which marks it as replaceable."""
COLOURS = (
    "#332288", "#CC6677", "#117733", "#88CCEE", "#DDAA33",
    "#882255", "#44AA99", "#AA4499", "#999933",
)  # fmt: skip
"""Paul Tol's muted scheme, readable with colour blindness, with a darker sand."""
REFERENCE_COLOUR = "#333333"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""With 9 colours, enough for 63 distinct methods."""
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
    """Use only these settings of matplotlib, and restore the previous ones at the end."""
    with mpl.rc_context(), warnings.catch_warnings():
        # Text stays text in the SVG, so a reader's font may contain glyphs missing here.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        yield


def blank(width: float, height: float) -> Figure:
    """Return an empty figure, outside pyplot's global state, of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def svg(figure: Figure) -> bytes:
    """Convert a figure to SVG without a date."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Source": MARK})
    return file.getvalue()


def look(methods: Sequence[str], reference: str) -> dict[str, dict[str, Any]]:
    """Return colour and marker per method; the reference is dark grey."""
    others = [method for method in methods if method != reference]
    looks = {
        method: {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[(n + 1) % len(MARKERS)]}
        for n, method in enumerate(others)
    }
    return looks | {reference: {"color": REFERENCE_COLOUR, "marker": MARKERS[0]}}


def axis_label(axes: Axes, x: str, y: str) -> None:
    """Label both axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
