"""Colours of a report, and matplotlib figures as SVG in a page that follows light and dark mode."""

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LIGHT = {
    "paper": "#fdfdfc",
    "ink": "#1d1f23",
    "soft": "#62666f",
    "line": "#dcdee3",
    "ground": "#eceef1",
    "empty": "#f6f7f8",
    "up": "#f0a04b",
    "down": "#a99be0",
    "training": "#6f7885",
    "validation": "#0f6cbd",
    "good": "#1d7044",
    "bad": "#b3261e",
}
"""Colours by CSS variable. Drawings use them too, so that each is one colour of `DARK`."""
DARK = {
    "paper": "#15171b",
    "ink": "#e8eaee",
    "soft": "#a3a9b4",
    "line": "#343942",
    "ground": "#2a2f37",
    "empty": "#20242a",
    "up": "#9c5208",
    "down": "#6252b5",
    "training": "#98a1af",
    "validation": "#6cb2f5",
    "good": "#6fce9c",
    "bad": "#ff8a80",
}
REACH = (1.5, 3.0)
"""Minimum and maximum ratio at full colour. The maximum keeps smaller changes visible when one
layer grows tenfold."""
MONO, SANS = "DejaVu Sans Mono", "DejaVu Sans"
"""Fonts of the figures, which matplotlib contains; pages use the reader's own."""
STYLE = {
    "font.family": [SANS],
    "svg.fonttype": "none",
    "svg.hashsalt": "dynlora",
    "text.parse_math": False,
}
VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()} | {
    f"'{MONO}'": "var(--mono)",
    f"'{SANS}'": "var(--sans)",
}
"""CSS variables of a page by the colour or font in a figure."""
PIXELS_PER_INCH = 72  # one unit of SVG is one pixel of the page
PNG_SCALE = 1.6
LARGEST_PNG = 12_000  # maximum pixels per side of a picture
_TAG = re.compile(r"<[^>]*>")
_UNSEEN = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)
_VARIABLE = re.compile("|".join(map(re.escape, VARIABLES)))


@dataclass(frozen=True, slots=True)
class RankScale:
    """The colour scale of all ranks of a run: violet lost rank, orange gained."""

    reach: float  # ratio to the rank at the start at full colour

    def strength(self, rank: int, start: int) -> float:
        """Return the log ratio of a rank to its start, scaled to [-1, 1]."""
        if rank < 1 or start < 1:
            return float((rank > start) - (rank < start))
        return max(-1.0, min(1.0, math.log(rank / start) / math.log(self.reach)))


def rank_scale(moves: Iterable[tuple[int, int]]) -> RankScale:
    """Return a scale that covers all pairs of rank and rank at the start, within `REACH`."""
    least, most = REACH
    ratios = [max(rank, start) / max(1, min(rank, start)) for rank, start in moves]
    return RankScale(min(max([least, *ratios]), most))


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with its content in words."""

    figure: Figure
    title: str
    description: str
    tooltips: Mapping[str, str] = field(default_factory=dict)  # text by the `gid` of an artist


@contextmanager
def drawing_style() -> Iterator[None]:
    """Apply the style of figures and ignore characters that the fonts lack."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def blank(
    width: float, height: float, box: tuple[float, float, float, float]
) -> tuple[Figure, Axes]:
    """Return a figure and its frameless axes; `box` is left, top, right, bottom; in pixels."""
    figure = Figure(
        figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH
    )
    left, top, right, bottom = box
    axes = figure.add_axes(
        (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
    )
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=LIGHT["soft"], labelsize=11)
    return figure, axes


def mark_events(axes: Axes, at: Sequence[int], y: float) -> None:
    """Draw a dashed line per event, with its number where there is room.

    The horizontal axis is optimizer steps; `y` is the numbers' height in data coordinates.
    """
    last = -float("inf")
    for number, step in enumerate(at, start=1):
        axes.axvline(step, color=LIGHT["soft"], linewidth=1, linestyle=(0, (4, 3)), clip_on=False)
        x = float(axes.transData.transform((step, 0))[0])
        if x - last >= 16:
            axes.text(step, y, str(number), ha="center", fontsize=10, color=LIGHT["soft"])
            last = x


def drawable(text: str) -> str:
    """Replace the characters that a figure cannot show, such as line ends."""
    return "".join(character if character.isprintable() else "�" for character in text)


def to_svg(drawing: Drawing, key: str) -> str:
    """Return a drawing as an element of a page, reproducibly; `key` is a unique prefix of ids."""
    file = io.StringIO()
    with drawing_style():
        drawing.figure.savefig(file, format="svg", facecolor="none", metadata={"Date": None})
    content = _UNSEEN.sub("", file.getvalue().partition("<svg")[2].partition(">")[2])
    content = _TAG.sub(lambda found: _page_tag(found[0], key, drawing.tooltips), content)
    width, height = drawing.figure.get_size_inches() * PIXELS_PER_INCH
    return (
        f'<svg role="img" aria-labelledby="{key}-title {key}-description" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
        f'<title id="{key}-title">{escape(drawing.title)}</title>'
        f'<desc id="{key}-description">{escape(drawing.description)}</desc>{content}'
    )


def write_png(drawing: Drawing, path: Path) -> None:
    """Write a drawing as a PNG file."""
    scale = min(PNG_SCALE, LARGEST_PNG / (PIXELS_PER_INCH * max(drawing.figure.get_size_inches())))
    with drawing_style():
        drawing.figure.savefig(
            path, format="png", dpi=scale * PIXELS_PER_INCH, facecolor=LIGHT["paper"]
        )


def _page_tag(tag: str, key: str, tooltips: Mapping[str, str]) -> str:
    """Return a tag of a figure with the page's colours, fonts and ids."""
    group = re.fullmatch(r'<g id="(.*)">', tag)
    if group:
        text = tooltips.get(group[1])
        return "<g>" if text is None else f"<g><title>{escape(text)}</title>"
    tag = _VARIABLE.sub(lambda found: VARIABLES[found[0]], tag)
    tag = re.sub(r' id="|(?:xlink:)?href="#|url\(#', lambda found: f"{found[0]}{key}-", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag.replace("xlink:", "").replace("\n", ""))
    return re.sub(r"(\.\d\d)\d+", r"\1", tag)
