"""Colours of a report, and drawings of plain shapes as SVG, or as a PNG file."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, cycle, takewhile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

RUNS = ("run1", "run2", "run3", "run4", "run5", "run6")  # colours of runs in a comparison
PALETTE = {
    "paper": ("#fdfdfc", "#15171b"),
    "ink": ("#1d1f23", "#e8eaee"),
    "soft": ("#62666f", "#a3a9b4"),
    "line": ("#dcdee3", "#343942"),
    "ground": ("#eceef1", "#2a2f37"),
    "empty": ("#f6f7f8", "#20242a"),
    "up": ("#f0a04b", "#9c5208"),
    "down": ("#a99be0", "#6252b5"),
    "training": ("#666f7c", "#98a1af"),
    "validation": ("#0f6cbd", "#6cb2f5"),
    "good": ("#1d7044", "#6fce9c"),
    "bad": ("#b3261e", "#ff8a80"),
    "run1": ("#0f6cbd", "#6cb2f5"),
    "run2": ("#a85200", "#f0a35e"),
    "run3": ("#1d7044", "#6fce9c"),
    "run4": ("#7b3fb0", "#c9a3f5"),
    "run5": ("#b3264f", "#ff8aa8"),
    "run6": ("#56606b", "#b4bcc7"),
}
"""Colours by CSS variable, on light and on dark paper. Drawings have the light ones, so that each
is one dark colour."""
LIGHT, DARK = ({name: pair[place] for name, pair in PALETTE.items()} for place in (0, 1))
REACH = (1.5, 3.0)
"""Minimum and maximum ratio at full colour. The maximum keeps smaller changes visible when one
layer grows tenfold."""
PNG_SCALE = 1.6
FINE = 2  # pixels drawn per pixel of a picture and side, for smooth lines
LARGEST_PNG = 12_000  # maximum pixels per side of a picture
COLOURS = 64  # of a picture; more make its file larger, but no clearer
ASCII = str.maketrans({"→": "to", "×": "x"})  # for the font of pictures
DASH = 4  # length of dashes and gaps in pixels
VARIABLE = re.compile(r'="var\(--(\w+)\)"')
FILE_ATTRIBUTES = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
PAPER = '<rect width="100%" height="100%" fill="var(--paper)"/>'
Point = tuple[float, ...]
SMALL, MONO, BOLD = ' font-size="10"', ' font-family="var(--mono)"', ' font-weight="bold"'  # styles


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
    """Shapes with their content in words; `shapes` are SVG elements."""

    width: float
    height: float
    title: str
    description: str
    shapes: Sequence[str]


# Positions and sizes are in pixels from the upper left corner; colours are keys of `LIGHT`.


def bar(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1) -> str:
    """Return a filled rectangle."""
    return (
        f'<rect x="{x:.6g}" y="{y:.6g}" width="{width:.6g}" height="{height:.6g}" '
        f'fill="var(--{colour})" fill-opacity="{opacity:.3g}"/>'
    )


def dot(x: float, y: float, fill: str, edge: str) -> str:
    """Return a filled circle."""
    return (
        f'<circle cx="{x:.6g}" cy="{y:.6g}" r="3.5" fill="var(--{fill})" stroke="var(--{edge})"/>'
    )


def line(points: Iterable[tuple[float, float]], colour: str, style: str = "") -> str:
    """Return points joined by a line; `style` contains more attributes."""
    places = " ".join(f"{x:.6g},{y:.6g}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="var(--{colour})"{style}/>'


def text(
    x: float, y: float, content: str, colour: str = "ink", anchor: str = "start", style: str = ""
) -> str:
    """Return a line of text on base line `y`; `x` is its `start`, `middle` or `end`."""
    return (
        f'<text x="{x:.6g}" y="{y:.6g}" text-anchor="{anchor}" fill="var(--{colour})"{style}>'
        f"{escape(drawable(content))}</text>"
    )


def event_marks(
    places: Iterable[float], top: float, bottom: float, numbers: float
) -> Iterator[str]:
    """Yield a dashed line per event, with its number at height `numbers` where there is room."""
    last = -math.inf
    for number, x in enumerate(places, start=1):
        yield line([(x, top), (x, bottom)], "soft", f' stroke-dasharray="{DASH}"')
        if x - last >= 16:
            yield text(x, numbers, str(number), "soft", "middle", SMALL)
            last = x


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Return at most `most + 1` round numbers at equal distances; `whole` without fractions."""
    apart = (high - low) / most
    power = 10.0 ** math.floor(math.log10(apart))
    step = next(n * power for n in (1, 2, 5, 10, 20) if n * power >= apart)
    step = max(1.0, step) if whole else step
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def drawable(text: str) -> str:
    """Replace the characters that a figure cannot show, such as line ends."""
    if text.isprintable():  # as most are, which is much faster to find out
        return text
    return "".join(character if character.isprintable() else "�" for character in text)


def to_svg(drawing: Drawing, key: str) -> str:
    """Return a drawing as an element of a page; `key` is a unique prefix of ids."""
    width, height = f"{drawing.width:.0f}", f"{drawing.height:.0f}"
    return (
        f'<svg role="img" aria-labelledby="{key}-title {key}-description" font-size="11" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<title id="{key}-title">{escape(drawing.title)}</title>'
        f'<desc id="{key}-description">{escape(drawing.description)}</desc>'
        f"{''.join(drawing.shapes)}</svg>"
    )


def svg_file(drawing: Drawing) -> str:
    """Return a drawing in light colours as the content of an SVG file."""
    inside = to_svg(drawing, "drawing").replace("<svg", f"<svg {FILE_ATTRIBUTES}", 1)
    inside = inside.replace("</desc>", f"</desc>{PAPER}", 1)
    # Quotes are escaped in texts, so that only attributes match.
    return VARIABLE.sub(lambda match: f'="{LIGHT.get(match[1], "monospace")}"', inside)


def write_png(drawing: Drawing, path: Path) -> None:
    """Write a drawing as a PNG file in light colours."""
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    side = max(drawing.width, drawing.height)
    fine = FINE if FINE * PNG_SCALE * side <= LARGEST_PNG else 1
    scale = fine * min(PNG_SCALE, LARGEST_PNG / side)
    size = (math.ceil(scale * drawing.width), math.ceil(scale * drawing.height))
    image = Image.new("RGB", size, LIGHT["paper"])
    pen = ImageDraw.Draw(image, "RGBA")
    for shape in ElementTree.fromstring(to_svg(drawing, "png")).iter():
        given = shape.attrib
        x, y, width, height, radius = (
            scale * float(given.get(key, 0)) for key in ("x", "y", "width", "height", "r")
        )
        fill, stroke = (LIGHT.get(given.get(key, "")[6:-1]) for key in ("fill", "stroke"))
        thick = max(1, round(scale * float(given.get("stroke-width", 1))))
        if shape.tag == "rect" and fill:
            tint = (*ImageColor.getrgb(fill)[:3], round(255 * float(given["fill-opacity"])))
            pen.rectangle((x, y, max(x, x + width - 1), max(y, y + height - 1)), fill=tint)
        elif shape.tag == "circle":
            centre = (scale * float(given["cx"]), scale * float(given["cy"]))
            pen.circle(centre, radius + thick / 2, fill, stroke, thick)
        elif shape.tag == "text":
            font = ImageFont.load_default(scale * float(given.get("font-size", 11)))
            anchor = f"{given['text-anchor'][0]}s".replace("es", "rs").replace("ss", "ls")
            pen.text((x, y), (shape.text or "").translate(ASCII), fill, font, anchor)
        elif shape.tag == "polyline":
            places = [scale * float(n) for n in re.split("[, ]", given["points"])]
            lengths = [scale * float(n) for n in given.get("stroke-dasharray", "").split()]
            for part in _dashes([*zip(places[::2], places[1::2], strict=True)], lengths):
                pen.line(part, fill=stroke, width=thick, joint="curve")
    image.reduce(fine).quantize(COLOURS).save(path, format="PNG", optimize=True)


def _dashes(points: Sequence[Point], lengths: Sequence[float]) -> Iterator[list[Point]]:
    """Yield the drawn parts of a line; `lengths` are of dashes and gaps in turn, empty for none."""
    along = [*accumulate(map(math.dist, points, points[1:]), initial=0.0)]  # from the first point
    turns = accumulate(cycle(lengths) if lengths else [math.inf], initial=0.0)
    edges = [*takewhile(lambda edge: edge < along[-1], turns), along[-1]]
    for begin, end in zip(edges[::2], edges[1::2], strict=False):
        places = [begin, *(place for place in along if begin < place < end), end]
        x, y = (np.interp(places, along, values).tolist() for values in zip(*points, strict=True))
        yield [*zip(x, y, strict=True)]
