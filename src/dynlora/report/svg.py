"""Colours of a report, and drawings of plain shapes: SVG in a page, or a PNG file."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

LIGHT = {
    "paper": "#fdfdfc",
    "ink": "#1d1f23",
    "soft": "#62666f",
    "line": "#dcdee3",
    "ground": "#eceef1",
    "empty": "#f6f7f8",
    "up": "#f0a04b",
    "down": "#a99be0",
    "training": "#666f7c",
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
PNG_SCALE = 1.6
LARGEST_PNG = 12_000  # maximum pixels per side of a picture
ASCII = str.maketrans({"→": "to", "×": "x"})  # for the font of pictures
DASH = 4  # length of dashes and gaps in pixels
FONTS = {"sans": "", "mono": ' font-family="var(--mono)"', "bold": ' font-weight="bold"'}


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


# Positions and sizes of shapes are in pixels from the upper left corner, colours are names.


class Bar(NamedTuple):
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    opacity: float = 1.0


class Curve(NamedTuple):
    """Points joined by a line."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.0
    dashed: bool = False


class Dot(NamedTuple):
    """A small disc."""

    x: float
    y: float
    colour: str


class Text(NamedTuple):
    """One line of text; `y` is its base line."""

    x: float
    y: float
    text: str
    colour: str = "ink"
    size: float = 11.0
    anchor: str = "start"  # the place of `x`: `start`, `middle` or `end` of the text
    font: str = "sans"  # a key of `FONTS`


Plain = Bar | Curve | Dot | Text


class Titled(NamedTuple):
    """Shapes with a tooltip."""

    title: str
    shapes: Sequence[Plain]


Shape = Plain | Titled


@dataclass(frozen=True, slots=True)
class Drawing:
    """Shapes with their content in words."""

    width: float
    height: float
    title: str
    description: str
    shapes: Sequence[Shape]


def event_marks(
    places: Iterable[float], top: float, bottom: float, numbers: float
) -> Iterator[Shape]:
    """Yield a dashed line per event, with its number at height `numbers` where there is room."""
    last = -math.inf
    for number, x in enumerate(places, start=1):
        yield Curve([(x, top), (x, bottom)], "soft", dashed=True)
        if x - last >= 16:
            yield Text(x, numbers, str(number), "soft", 10, "middle")
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
    return "".join(character if character.isprintable() else "�" for character in text)


def to_svg(drawing: Drawing, key: str) -> str:
    """Return a drawing as an element of a page; `key` is a unique prefix of ids."""
    width, height = f"{drawing.width:.0f}", f"{drawing.height:.0f}"
    return (
        f'<svg role="img" aria-labelledby="{key}-title {key}-description" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<title id="{key}-title">{escape(drawing.title)}</title>'
        f'<desc id="{key}-description">{escape(drawing.description)}</desc>'
        f"{''.join(map(_element, drawing.shapes))}</svg>"
    )


def _element(shape: Shape) -> str:
    """Return a shape as an element, with the colours and fonts of the page."""
    match shape:
        case Bar(x, y, width, height, colour, opacity):
            seen = "" if opacity == 1 else f' fill-opacity="{opacity:.3g}"'
            return (
                f'<rect x="{x:.6g}" y="{y:.6g}" width="{width:.6g}" height="{height:.6g}" '
                f'fill="var(--{colour})"{seen}/>'
            )
        case Curve(points, colour, width, dashed):
            places = " ".join(f"{x:.6g},{y:.6g}" for x, y in points)
            dashes = f' stroke-dasharray="{DASH}"' if dashed else ""
            return (
                f'<polyline points="{places}" fill="none" stroke="var(--{colour})" '
                f'stroke-width="{width:g}"{dashes}/>'
            )
        case Dot(x, y, colour):
            return f'<circle cx="{x:.6g}" cy="{y:.6g}" r="3" fill="var(--{colour})"/>'
        case Text(x, y, text, colour, size, anchor, font):
            return (
                f'<text x="{x:.6g}" y="{y:.6g}" font-size="{size:g}" text-anchor="{anchor}" '
                f'fill="var(--{colour})"{FONTS[font]}>{escape(text)}</text>'
            )
        case Titled(title, shapes):
            return f"<g><title>{escape(title)}</title>{''.join(map(_element, shapes))}</g>"


def write_png(drawing: Drawing, path: Path) -> None:
    """Write a drawing as a PNG file in the light colours."""
    from PIL import Image, ImageDraw

    scale = min(PNG_SCALE, LARGEST_PNG / max(drawing.width, drawing.height))
    size = (math.ceil(scale * drawing.width), math.ceil(scale * drawing.height))
    image = Image.new("RGB", size, LIGHT["paper"])
    pen = ImageDraw.Draw(image, "RGBA")
    for shape in drawing.shapes:
        _paint(pen, shape, scale)
    image.save(path, format="PNG")


def _paint(pen: Any, shape: Shape, scale: float) -> None:
    from PIL import ImageColor, ImageFont

    match shape:
        case Titled(_, shapes):
            for inner in shapes:
                _paint(pen, inner, scale)
        case Bar(x, y, width, height, colour, opacity):
            fill = (*ImageColor.getrgb(LIGHT[colour])[:3], round(255 * opacity))
            right, bottom = scale * (x + width) - 1, scale * (y + height) - 1
            pen.rectangle((scale * x, scale * y, right, max(scale * y, bottom)), fill=fill)
        case Curve(((x, top), (_, bottom)), colour):  # the line of an event
            for y in range(round(top), round(bottom), 2 * DASH):
                ends = (scale * x, scale * y, scale * x, scale * min(y + DASH, bottom))
                pen.line(ends, fill=LIGHT[colour])
        case Text(x, y, text, colour, text_size, anchor, _):
            loaded = ImageFont.load_default(scale * text_size)
            place = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
            at = (scale * x, scale * y)
            pen.text(at, text.translate(ASCII), fill=LIGHT[colour], font=loaded, anchor=place)
