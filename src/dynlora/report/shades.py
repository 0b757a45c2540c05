"""Map the ratio of a rank to its start to a CSS class and an opacity.

`page.css` defines the colours for light mode, dark mode and print.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

REACH = (1.5, 3.0)
"""Minimum and maximum ratio at full colour, as in `heatmap.REACH`. The maximum keeps smaller
changes visible when one layer grows tenfold."""


@dataclass(frozen=True, slots=True)
class Shades:
    """The colour scale of all ranks on a page."""

    reach: float
    """Ratio to the start rank at full colour."""

    def strength(self, rank: int, start: int) -> float:
        """Return the log ratio of a rank to its start, scaled to [-1, 1]."""
        if rank < 1 or start < 1:
            return float((rank > start) - (rank < start))
        return max(-1.0, min(1.0, math.log(rank / start) / math.log(self.reach)))


def shades_for(moves: Iterable[tuple[int, int]]) -> Shades:
    """Return a scale that covers all pairs of rank and start, within `REACH`."""
    least, most = REACH
    ratios = [max(rank, start) / max(1, min(rank, start)) for rank, start in moves]
    return Shades(min(max([least, *ratios]), most))


def paint(strength: float) -> dict[str, object]:
    """Return the SVG attributes that colour a shape by a strength."""
    name = "up" if strength > 0 else "down" if strength < 0 else "same"
    return {"class_": name, "fill_opacity": round(abs(strength), 2)}
