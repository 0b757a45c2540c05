"""How strong a colour says that a rank moved: the ratio to the start in, class and opacity out.

Colours themselves are in `page.css`, for light, dark and paper; here is only how much of them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

REACH = (1.5, 3.0)
"""Least and largest ratio that has the full colour, as in `heatmap.REACH`: one layer that grew
tenfold shall not make all others look alike."""


@dataclass(frozen=True, slots=True)
class Shades:
    """The scale that all ranks of a page share."""

    reach: float
    """Ratio to the rank at the start that has the full colour."""

    def strength(self, rank: int, start: int) -> float:
        """Return how far a rank is from its start, from -1 (all lost) over 0 to 1."""
        if rank < 1 or start < 1:
            return float((rank > start) - (rank < start))
        return max(-1.0, min(1.0, math.log(rank / start) / math.log(self.reach)))


def shades_for(moves: Iterable[tuple[int, int]]) -> Shades:
    """Return a scale wide enough for all pairs of rank and start, within `REACH`."""
    least, most = REACH
    ratios = [max(rank, start) / max(1, min(rank, start)) for rank, start in moves]
    return Shades(min(max([least, *ratios]), most))


def paint(strength: float) -> dict[str, object]:
    """Return the attributes that give a shape the colour of a strength."""
    name = "up" if strength > 0 else "down" if strength < 0 else "same"
    return {"class_": name, "fill_opacity": round(abs(strength), 2)}
