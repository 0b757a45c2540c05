"""Draw the model in SVG, one row per block and one cell per layer, or list its layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynlora.report.blocks import Loose, Stack, arrange
from dynlora.report.markup import Node, append, figure, node
from dynlora.report.shades import Shades, paint
from dynlora.report.wording import shorten

ROW = 24
GAP = 6
LEFT = 96
"""Width of the column of block numbers."""
CHARACTER = 6.3
"""Width of a character of the headings."""
LINE = 13
"""Height of a line of the headings."""
LEAST_CELL = 62
WIDE_CELL = 130
"""Maximum width of a cell whose heading is short."""
ROOM = 1000
"""Width of the page."""
MOST_LOOSE = 8
"""Maximum number of loose layers to draw; longer groups are listed."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks to draw."""

    now: Mapping[str, int]
    """Rank by module name."""
    start: Mapping[str, int]
    """Rank at the start by module name; empty for methods with fixed ranks."""
    shades: Shades

    @property
    def highest(self) -> int:
        """The rank that fills a cell's whole width."""
        return max([1, *self.now.values()])

    def told(self, name: str) -> str:
        """Describe a layer's rank in words."""
        start = self.start.get(name, self.now[name])
        moved = f", {start} at the start" if start != self.now[name] else ""
        return f"{name}: rank {self.now[name]}{moved}"

    def strength(self, name: str) -> float:
        """Return the change of a layer's rank since the start, from -1 to 1."""
        return self.shades.strength(self.now[name], self.start.get(name, self.now[name]))


def diagram(ranks: Ranks) -> Node:
    """Draw the model's layers in the order of `ranks.now`.

    Args:
        ranks: At least one layer.
    """
    parts = arrange(list(ranks.now))
    drawing = node("div", class_="diagram")
    for number, part in enumerate(parts, start=1):
        if isinstance(part, Stack):
            append(drawing, _stack(part, ranks, f"stack-{number}"))
        elif len(part.names) <= MOST_LOOSE:
            append(drawing, _loose(part, ranks, f"loose-{number}"))
        else:
            append(drawing, _list(part, ranks))
    return drawing


def _stack(stack: Stack, ranks: Ranks, key: str) -> Node:
    kinds = stack.kinds
    heads = [kind.split(".") for kind in kinds]
    least = max(LEAST_CELL, min(WIDE_CELL, (ROOM - LEFT) / len(kinds) - GAP))
    widths = [max(least, CHARACTER * max(map(len, head)) + 10) for head in heads]
    lefts = [LEFT + sum(widths[:n]) + GAP * n for n in range(len(kinds))]
    top = LINE * max(map(len, heads)) + 28
    svg = figure(
        f"Ranks of {stack.prefix or 'the model'}",
        f"{len(stack.blocks)} rows, one a block, and {len(kinds)} columns, one a kind of layer.",
        lefts[-1] + widths[-1] + 8,
        top + len(stack.blocks) * (ROW + GAP) + 4,
        key,
    )
    append(svg, node("text", stack.prefix, class_="stack", x=0, y=14))
    for head, x, width in zip(heads, lefts, widths, strict=True):
        append(svg, _heading(head, x + width / 2, top - 9))
    for row, (block, layers) in enumerate(stack.blocks.items()):
        y = top + row * (ROW + GAP)
        frame = {"x": LEFT - 6, "y": y - 3, "width": lefts[-1] + widths[-1] - LEFT + 12}
        append(svg, node("rect", **frame, height=ROW + 6, rx=5, class_="block"))
        append(
            svg,
            node("text", f"block {block}", class_="row", x=LEFT - 16, y=y + 16, text_anchor="end"),
        )
        for kind, x, width in zip(kinds, lefts, widths, strict=True):
            if kind in layers:
                append(svg, _cell(layers[kind], x, y, width, ranks))
    return svg


def _heading(parts: Sequence[str], middle: float, base: float) -> Node:
    """Draw the parts of a kind's name on one line each, the last at the bottom."""
    group = node("g", class_="heading")
    for up, part in enumerate(reversed(parts)):
        style = "part" if up else "kind"
        append(
            group,
            node("text", part, class_=style, x=middle, y=base - up * LINE, text_anchor="middle"),
        )
    return group


def _cell(name: str, x: float, y: float, width: float, ranks: Ranks) -> Node:
    """Draw a layer's cell with a bar of a length proportional to its rank."""
    rank = ranks.now[name]
    bar = {"x": x, "y": y, "width": width * rank / ranks.highest, "height": ROW, "rx": 3}
    return node(
        "g",
        node("title", ranks.told(name)),
        node("rect", x=x, y=y, width=width, height=ROW, rx=3, class_="empty"),
        node("rect", **bar, class_="ground"),
        node("rect", **bar, **paint(ranks.strength(name))),
        node("text", str(rank), class_="n", x=x + 8, y=y + 16),
    )


def _loose(part: Loose, ranks: Ranks, key: str) -> Node:
    names = {name: shorten(name, 60) for name in part.names}
    left = CHARACTER * max(map(len, names.values())) + 14
    svg = figure(
        "Ranks of layers outside the blocks",
        f"{len(part.names)} layers.",
        left + 120,
        len(part.names) * (ROW + GAP),
        key,
    )
    for row, name in enumerate(part.names):
        y = row * (ROW + GAP)
        append(svg, node("text", names[name], class_="row mono", x=0, y=y + 16))
        append(svg, _cell(name, left, y, 100, ranks))
    return svg


def _list(part: Loose, ranks: Ranks) -> Node:
    layers = node("ul", class_="layers")
    for name in part.names:
        rank, start = ranks.now[name], ranks.start.get(name, ranks.now[name])
        moved = f"{start} → {rank}" if start != rank else f"{rank}"
        cells = node("span", name, class_="name"), node("span", moved, class_="number")
        append(layers, node("li", *cells))
    return layers
