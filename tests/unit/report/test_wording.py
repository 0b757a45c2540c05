"""Numbers as text."""

import math

import pytest

from dynlora.report import wording
from dynlora.report.wording import (
    bytes_text,
    change_text,
    listing,
    metric_text,
    seconds_text,
    share_text,
    shorten,
    verdict,
)
from dynlora.train.config import METRICS


@pytest.mark.parametrize(
    ("metric", "before", "after", "said"),
    [
        ("loss", 0.7, 0.5, "better"),
        ("perplexity", 20.0, 30.0, "worse"),
        ("rmse", 0.5, 0.7, "worse"),
        ("accuracy", 0.5, 0.7, "better"),
        ("pearson", 0.5, 0.4, "worse"),
        ("f1", 0.5, 0.5, ""),
        ("f1", None, 0.5, ""),
        ("f1", 0.5, math.nan, ""),
    ],
)
def test_errors_shall_fall_and_all_else_rise(
    metric: str, before: float | None, after: float | None, said: str
) -> None:
    assert verdict(metric, before, after) == said


def test_every_metric_that_falls_when_a_model_gets_better_is_one_of_a_task() -> None:
    named = {metric for metrics in METRICS.values() for metric in metrics}
    assert named >= wording.LOWER_IS_BETTER


def test_metrics_have_four_decimals_and_large_ones_fewer() -> None:
    values = [0.5, -0.00004, 12.3, 123456.78, 3.2e9, None, math.inf]
    assert [metric_text(value) for value in values] == [
        "0.5000", "-0.0000", "12.3000", "123,456.8", "3.200e+09", "not a number", "not a number",
    ]  # fmt: skip


def test_a_change_has_its_sign() -> None:
    assert change_text(0.25, 0.5) == "+0.2500"
    assert change_text(0.5, 0.25) == "−0.2500"
    assert change_text(0.5, 0.5) == "0.0000"
    assert change_text(None, 0.5) == change_text(0.5, math.nan) == ""


def test_durations_sizes_and_shares() -> None:
    assert [seconds_text(s) for s in (0.5, 77.79, 119.4, 150, 7325, None)] == [
        "0.50 s", "77.8 s", "119.4 s", "2 min 30 s", "2 h 02 min", "unknown",
    ]  # fmt: skip
    assert [bytes_text(b) for b in (2**20, 3 * 2**30, None)] == ["1.0 MiB", "3.00 GiB", "none"]
    assert share_text(1, 8) == "12.5%"
    assert share_text(1, 0) == share_text(None, 8) == ""


def test_long_names_keep_both_ends_and_long_lists_say_how_many_more() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcd…ghijk"
    assert listing(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listing(["a", "b"], 2) == "a, b"
