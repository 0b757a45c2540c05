"""Text of the document: aligned tables, escaped names, and formatted numbers."""

import math
import re
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from unicodedata import east_asian_width

from dynlora.report.wording import metric_text

MOST_OF_ERROR = 200
"""Maximum characters of a run's error."""
MINUS = "−"


def escape(text: str) -> str:
    """Escape a text on one line, so that Markdown shows it unchanged.

    Underscores within words need no escape.
    """
    marked = re.sub(r"([\\`*\[\]<>|~$&#!])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", marked)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> list[str]:
    """Return the lines of a table with padded columns, and an empty line.

    Args:
        head: Column names.
        rows: Escaped cells per row.
        words: Number of leading text columns, aligned left; the others are aligned right.
    """
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(3, *(_width(row[n]) for row in cells)) for n in range(len(head))]
    rule = ["-" * width if n < words else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    lines = [_line(row, widths, words) for row in [cells[0], rule, *cells[1:]]]
    return [*lines, ""]


def _line(row: Sequence[str], widths: Sequence[int], words: int) -> str:
    padded = []
    for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
        room = " " * (width - _width(cell))
        padded.append(cell + room if place < words else room + cell)
    return f"| {' | '.join(padded)} |"


def _width(text: str) -> int:
    """Return the number of columns of a text in a monospaced font."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def error_text(error: str) -> str:
    """Return a run's error on one line, truncated if long."""
    line = " ".join(error.split())
    return escape(line if len(line) <= MOST_OF_ERROR else line[: MOST_OF_ERROR - 1] + "…")


def seeds_text(seeds: Sequence[int]) -> str:
    """Format seeds as `seed 3` or `seeds 3, 7`."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"


def spread_text(values: Sequence[float]) -> str:
    """Format a mean and standard deviation; a dash without values."""
    if not values:
        return "–"
    mean = signed_zero(metric_text(fmean(values)))
    return f"{mean} ± {metric_text(stdev(values))}" if len(values) > 1 else mean


def signed_text(value: float) -> str:
    """Format a difference with its sign and four decimals; a dash if it is not finite."""
    if not math.isfinite(value):
        return "–"
    size = metric_text(abs(value))
    if float(size.replace(",", "")) == 0:
        return size
    return f"{'+' if value > 0 else MINUS}{size}"


def interval_text(interval: tuple[float, float] | None) -> str:
    """Format an interval; a dash if there is none."""
    if interval is None:
        return "–"
    return f"{signed_text(interval[0])} to {signed_text(interval[1])}"


def p_text(p: float | None) -> str:
    """Format a p-value; a dash if there is none."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def setting_text(value: float) -> str:
    """Format a setting, such as a learning rate, with three digits."""
    return f"{value:.3g}" if math.isfinite(value) else "not a number"


def signed_zero(text: str) -> str:
    """Remove the sign of a zero, and replace hyphens by minus signs."""
    return text.replace("-0.0000", "0.0000").replace("-", MINUS)
