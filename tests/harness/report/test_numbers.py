"""Numbers as text: spreads, signs, zeros and p-values."""

import math

import pytest

from benchmarks.harness.report.numbers import (
    interval_text,
    p_text,
    setting_text,
    signed_text,
    spread_text,
)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "–"),
        ([0.5], "0.5000"),
        ([0.4, 0.6], "0.5000 ± 0.1414"),  # sqrt(0.02), by n - 1
        ([1.0, 2.0, 3.0], "2.0000 ± 1.0000"),
        ([-0.5, -0.5], "−0.5000 ± 0.0000"),
        ([-0.00001], "0.0000"),
    ],
)
def test_a_mean_comes_with_the_standard_deviation_of_what_was_drawn(values, text):
    assert spread_text(values) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "+0.0123"), (-0.5, "−0.5000"), (0.0, "0.0000"), (-1e-9, "0.0000"),
     (math.nan, "–"), (-2500.0, "−2,500.0")],
)  # fmt: skip
def test_a_difference_has_its_sign_unless_it_is_zero(value, text):
    assert signed_text(value) == text


def test_an_interval_names_both_ends():
    assert interval_text((-0.25, 0.5)) == "−0.2500 to +0.5000"
    assert interval_text(None) == "–"


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (1.0, "1.0000"), (0.002, "0.0020"), (0.00001, "< 0.0001")]
)
def test_a_p_value_has_four_decimals(p, text):
    assert p_text(p) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3e-4, "0.0003"), (2.0, "2"), (math.nan, "not a number")]
)
def test_a_setting_has_three_digits(value, text):
    assert setting_text(value) == text
