"""Ranges and texts, read from the dataclasses' own words."""

from dataclasses import dataclass

import pytest

from dynlora.cli.schema import describe, stated_range


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("Batches per optimizer step, at least 1.", {"minimum": 1}),
        ("Longer texts are cut. At least 8.", {"minimum": 8}),
        ("Highest learning rate, above 0. [lr]", {"exclusiveMinimum": 0}),
        ("Dropout, in [0, 1).", {"minimum": 0, "exclusiveMaximum": 1}),
        ("A fraction, in (0, 0.5].", {"exclusiveMinimum": 0, "maximum": 0.5}),
        ("Lowest rank, at least 1; ties go down.", {"minimum": 1}),
    ],
)
def test_a_range_in_words_becomes_limits(text: str, limits: dict[str, float]) -> None:
    assert stated_range(text) == limits


@pytest.mark.parametrize(
    "text",
    [
        "Below 1 sharpens, above 1 flattens.",
        "When ranks last move. In [first_event, 1].",
        "Rank at the start, above `lora.r`; null takes 1.5 times `lora.r`.",
        "Scale each step by its importance, in [1/2, 2], without more.",
        "Gradients are clipped to this norm; 0 does not clip.",
    ],
)
def test_what_is_no_range_in_numbers_sets_no_limit(text: str) -> None:
    assert stated_range(text) == {}


@dataclass
class Described:
    """A class."""

    one: int = 1
    """First, which
    takes two lines."""
    two: int = 2
    three: int = 3
    """Third."""


def test_only_the_text_right_under_a_field_describes_it() -> None:
    assert describe(Described) == {"one": "First, which takes two lines.", "three": "Third."}
