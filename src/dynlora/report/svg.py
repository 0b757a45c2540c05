"""Colours of a report, and drawings of plain shapes as SVG, or as a PNG file."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from xml.etree import ElementTree

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
SMALL, MONO = ' font-size="10"', ' font-family="var(--mono)"'  # styles of texts


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


def write_png(drawing: Drawing, path: Path) -> None:
    """Write a drawing of bars, texts and dashed vertical lines as a PNG file in light colours."""
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    scale = min(PNG_SCALE, LARGEST_PNG / max(drawing.width, drawing.height))
    size = (math.ceil(scale * drawing.width), math.ceil(scale * drawing.height))
    image = Image.new("RGB", size, LIGHT["paper"])
    pen = ImageDraw.Draw(image, "RGBA")
    for shape in ElementTree.fromstring(to_svg(drawing, "png")).iter():
        given = shape.attrib
        x, y, width, height = (
            scale * float(given.get(key, 0)) for key in ("x", "y", "width", "height")
        )
        colour = LIGHT.get(given.get("fill", "")[len("var(--") : -1], LIGHT["soft"])
        if shape.tag == "rect":
            fill = (*ImageColor.getrgb(colour)[:3], round(255 * float(given["fill-opacity"])))
            pen.rectangle((x, y, x + width - 1, max(y, y + height - 1)), fill=fill)
        elif shape.tag == "text":
            font = ImageFont.load_default(scale * float(given.get("font-size", 11)))
            anchor = f"{given['text-anchor'][0]}s".replace("es", "rs").replace("ss", "ls")
            pen.text((x, y), (shape.text or "").translate(ASCII), colour, font, anchor)
        elif shape.tag == "polyline":
            x, top, _, bottom = (scale * float(n) for n in re.split("[, ]", given["points"]))
            for start in range(round(top), round(bottom), 2 * DASH):
                pen.line((x, start, x, min(start + DASH, bottom)), fill=colour)
    image.save(path, format="PNG")
