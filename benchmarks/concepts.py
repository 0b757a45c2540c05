"""The figure of the method in `docs/method.md`: which stage hands what to which.

    python -m benchmarks.concepts docs/stages.svg

It needs no record, because it shows the design.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynlora.report.svg import Drawing, bar, line, svg_file, text

WIDTH, HEIGHT = 190, 46  # of a box
LEFT, RIGHT = 70, 420  # of the columns
ROWS = (10, 112, 214)
BOXES = (
    (LEFT, 0, "Model with LoRA layers", "forward"),
    (RIGHT, 0, "Loss of the task", "backward"),
    (LEFT, 1, "Input Feature Analyzer", "samples tokens"),
    (RIGHT, 1, "Layer Importance Assessor", "scores only if gradients agree"),
    (LEFT, 2, "Rank Adjuster", "whole ranks within the budget"),
    (RIGHT, 2, "Weight Allocator", "scores to shares"),
)
Point = tuple[float, float]


def arrow(points: Sequence[Point], label: str, at: Point, anchor: str = "start") -> Iterator[str]:
    """Yield a line with a head at its last point, and its label."""
    (x1, y1), (x2, y2) = points[-2:]
    dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    yield line(points, "soft")
    wings = [(x2 - 6 * dx + 4 * s * dy, y2 - 6 * dy + 4 * s * dx) for s in (1, -1)]
    yield line([wings[0], (x2, y2), wings[1]], "soft")
    yield text(*at, label, "soft", anchor)


def shapes() -> Iterator[str]:
    """Yield all boxes and arrows."""
    for x, row, name, does in BOXES:
        yield bar(x, ROWS[row], WIDTH, HEIGHT, "up" if row == 0 else "down", 0.35)
        yield text(x + WIDTH / 2, ROWS[row] + 20, name, "ink", "middle", ' font-weight="600"')
        yield text(x + WIDTH / 2, ROWS[row] + 36, does, "ink", "middle")
    middles = [row + HEIGHT / 2 for row in ROWS]
    between = (LEFT + WIDTH + RIGHT) / 2
    for x, labels in (
        (LEFT + WIDTH / 2, ("layer inputs", "directions in use")),
        (RIGHT + WIDTH / 2, ("gradients", "score per layer")),
    ):
        for row, label in enumerate(labels):
            bottom, top = ROWS[row] + HEIGHT, ROWS[row + 1]
            yield from arrow([(x, bottom), (x, top)], label, (x + 8, (bottom + top) / 2 + 4))
    ends = (LEFT + WIDTH, RIGHT)
    yield from arrow([(end, middles[0]) for end in ends], "logits", (between, 26), "middle")
    back = [(end, middles[2]) for end in ends[::-1]]
    yield from arrow(back, "share per layer", (between, 230), "middle")
    loop = [(LEFT, middles[2]), (30, middles[2]), (30, middles[0]), (LEFT, middles[0])]
    yield from arrow(loop, "shrink, grow", (36, 92))


def draw() -> Drawing:
    """Return the figure."""
    return Drawing(
        640,
        270,
        "From layer inputs and gradients to ranks",
        "Layer inputs reach the Input Feature Analyzer, gradients the Layer Importance Assessor. "
        "Scores become shares in the Weight Allocator, and whole ranks in the Rank Adjuster, which "
        "change the LoRA layers at events.",
        [*shapes()],
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg_file(draw()) + "\n", encoding="utf-8")
