"""A search over doubled and halved settings: the same first trials, then neighbours of the best."""

from collections.abc import Mapping, Sequence

Point = tuple[float, ...]
"""One value per searched setting."""


def next_trial(
    first: Sequence[Sequence[float]], ended: Mapping[Point, float], *, most: int, moving: int
) -> Point | None:
    """Return the next point to try; None if no neighbour of the best point is missing.

    The chosen point is therefore never at the edge of the search, unless `most` ended it.

    Args:
        first: Points that are tried first, for every arm.
        ended: Loss per tried point; infinite if the run diverged.
        most: Most points per search.
        moving: Number of leading values that are doubled and halved.
    """
    for point in map(tuple, first):
        if point not in ended:
            return point
    best = best_of(ended)
    around = [
        (*best[:place], best[place] * factor, *best[place + 1 :])
        for place in range(moving)
        for factor in (2.0, 0.5)
    ]
    missing = [point for point in around if point not in ended]
    return missing[0] if missing and len(ended) < most else None


def best_of(ended: Mapping[Point, float]) -> Point:
    """Return the point with the lowest loss."""
    return min(ended, key=lambda point: ended[point])
