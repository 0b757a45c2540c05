"""Format numbers of the document: means with spread, signed differences, p-values."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from dynlora.report.wording import metric_text

MINUS = "−"


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
