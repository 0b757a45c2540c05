"""Colours of a report in light and dark mode, and the colour scale of rank changes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class RankScale:
    """The colour scale of all ranks of a run: violet lost rank, orange gained."""

    reach: float
    """Ratio to the rank at the start at full colour."""

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
