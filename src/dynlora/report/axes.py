"""Scales of drawings: map values to pixels and choose round numbers as labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynlora.report.markup import Node, append, node


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    begin: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        part = (value - self.low) / (self.high - self.low)
        return self.begin + part * (self.end - self.begin)


def round_steps(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` + 1 multiples of 1, 2 or 5 times a power of ten within [low, high].

    Args:
        low: Lowest value.
        high: Highest value, above `low`.
        most: Maximum number of intervals, at least 1.
    """
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * (1 - 1e-9))
    first = math.ceil(low / size - 1e-9)
    return [n * size for n in range(first, math.floor(high / size + 1e-9) + 1)]


def label(value: float) -> str:
    """Format a round number without floating-point noise."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def step_axis(steps: Scale, y: float, *, offset: float) -> Node:
    """Draw an axis of optimizer steps with its labels.

    Args:
        steps: Maps steps to pixels.
        y: Pixel of the axis line.
        offset: Pixels from the line to the labels' baseline; negative above the line.
    """
    group = node("g", class_="axis")
    append(group, node("line", x1=steps.begin, x2=steps.end, y1=y, y2=y))
    width = abs(steps.end - steps.begin)
    for value in round_steps(steps.low, steps.high, max(1, int(width // 90))):
        if value != int(value):
            continue
        x = steps(value)
        append(group, node("line", x1=x, x2=x, y1=y, y2=y + math.copysign(4, offset)))
        append(group, node("text", label(value), x=x, y=y + offset, text_anchor="middle"))
    return group


def event_marks(at: Sequence[int], steps: Scale, top: float, bottom: float) -> Node:
    """Draw a dashed line per event, with its number where there is room.

    Args:
        at: Steps of the events.
        steps: Maps steps to pixels.
        top: Pixel of the lines' upper end; the numbers are above.
        bottom: Pixel of the lines' lower end.
    """
    group = node("g", class_="events")
    last = -math.inf
    for number, step in enumerate(at, start=1):
        x = steps(step)
        append(group, node("line", x1=x, x2=x, y1=top, y2=bottom))
        if x - last >= 16:
            append(group, node("text", str(number), x=x, y=top - 3.0, text_anchor="middle"))
            last = x
    return group
