"""Turn matplotlib figures into SVG inside a page that follows its light and dark colours."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynlora.report.colours import LIGHT

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
PIXELS_PER_INCH = 72
"""One unit of SVG is one pixel of the page."""
PNG_SCALE = 1.6
LARGEST_PNG = 12_000
"""Maximum pixels per side of a picture."""
_TAG = re.compile(r"<[^>]*>")
_UNSEEN = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)
_VARIABLE = re.compile("|".join(map(re.escape, VARIABLES)))


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with its content in words."""

    figure: Figure
    title: str
    description: str
    tooltips: Mapping[str, str] = field(default_factory=dict)
    """Text under the pointer, by the `gid` of an artist."""


@contextmanager
def drawing_style() -> Iterator[None]:
    """Apply the style of figures and ignore characters that the fonts lack."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def blank(
    width: float, height: float, box: tuple[float, float, float, float]
) -> tuple[Figure, Axes]:
    """Return a new figure and its axes without frame.

    Args:
        width: Of the figure, in pixels.
        height: Of the figure, in pixels.
        box: Left, top, right and bottom of the axes, in pixels.
    """
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

    Args:
        axes: Their horizontal axis is optimizer steps.
        at: Steps of the events.
        y: Height of the numbers, in data coordinates.
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
    """Return a drawing as an element of a page; equal drawings give equal text.

    Args:
        drawing: The drawing.
        key: Prefix of the element ids, unique in the page.
    """
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
