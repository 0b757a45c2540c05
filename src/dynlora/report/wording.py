"""Format metrics, changes, seconds, bytes and parameter counts as text."""

import math
from collections.abc import Mapping

FALLING = ("loss", "perplexity", "rmse")  # metrics that improve by falling; others by rising
METRICS = (
    *FALLING, "accuracy", "cosine", "exact_match", "f1", "image_to_text_recall_1",
    "image_to_text_recall_5", "macro_f1", "matthews", "micro_f1", "pearson", "r2",
    "reward_accuracy", "reward_margin", "spearman", "text_to_image_recall_1",
    "text_to_image_recall_5", "token_accuracy",
)  # fmt: skip
"""Every metric of every task."""
CHANCE = "no better than chance"
CHANCE_TEXT = f"predictions are {CHANCE}: their correlation with the labels is 0"


def is_chance(metrics: Mapping[str, float | None]) -> bool:
    """Return whether the correlation of predictions and labels is 0, as of a constant model."""
    return any(metrics.get(name) == 0 for name in ("matthews", "pearson"))


def lower_is_better(metric: str) -> bool:
    """Return whether lower values of a metric are better; False for an unknown metric."""
    return metric in FALLING


def metric_text(value: float | None) -> str:
    """Format a metric with four decimals, or fewer from 1000 on."""
    if value is None or not math.isfinite(value):
        return "not a number"
    if abs(value) < 1000:
        return f"{value:.4f}"
    return f"{value:,.1f}" if abs(value) < 1e7 else f"{value:.3e}"


def change_text(before: float | None, after: float | None) -> str:
    """Return the signed change of a metric; empty if it is not a finite number."""
    if before is None or after is None or not math.isfinite(after - before):
        return ""
    sign = "+" if after > before else "−" if after < before else ""
    return f"{sign}{metric_text(abs(after - before))}"


def verdict(
    metric: str, earlier: Mapping[str, float | None], later: Mapping[str, float | None]
) -> str:
    """Return `better` or `worse`; empty if the values are equal or not comparable.

    Of predictions no better than chance, only the loss is comparable: other metrics say which
    labels are common.
    """
    before, after = earlier.get(metric), later.get(metric)
    if metric != "loss" and (is_chance(earlier) or is_chance(later)):
        return ""
    if before is None or after is None or before == after or not math.isfinite(after - before):
        return ""
    return "better" if (after < before) == lower_is_better(metric) else "worse"


def seconds_text(value: float | None) -> str:
    """Format a duration in seconds, minutes or hours."""
    if value is None:
        return "unknown"
    if value < 120:
        return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def about_text(value: float) -> str:
    """Format an estimate of seconds without fractions."""
    return f"{value:.0f} s" if value < 120 else seconds_text(value)


def bytes_text(value: float | None) -> str:
    """Format a size in MiB, or in GiB from 1 GiB on."""
    if value is None:
        return "none"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def count_text(value: float | None) -> str:
    """Format a whole number with thousands separators."""
    return "unknown" if value is None else f"{value:,.0f}"


def cell_text(value: object) -> str:
    """Format a text, count or metric."""
    if isinstance(value, float):
        return metric_text(value)
    return count_text(value) if isinstance(value, int) else str(value or "–")


def share_text(part: float | None, whole: float | None) -> str:
    """Return a share in percent; empty if the part is missing or the whole is missing or 0."""
    return "" if part is None or not whole else f"{part / whole:.1%}"


def shorten(text: str, most: int) -> str:
    """Cut the middle of a text longer than `most` characters."""
    if len(text) <= most:
        return text
    left = (most - 1) // 2
    return f"{text[:left]}…{text[len(text) - (most - 1 - left) :]}"
