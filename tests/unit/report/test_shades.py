"""How strong a colour says that a rank moved, and that text on it can be read."""

import re
from importlib.resources import files

import pytest

from dynlora.report.shades import REACH, paint, shades_for

CSS = files("dynlora.report").joinpath("page.css").read_text("utf-8")


def test_doubling_is_as_strong_as_halving() -> None:
    shades = shades_for([(16, 8), (4, 8)])
    assert shades.reach == 2
    assert shades.strength(16, 8) == pytest.approx(1)
    assert shades.strength(4, 8) == pytest.approx(-1)
    assert 0 < shades.strength(9, 8) < shades.strength(12, 8) < 1
    assert shades.strength(8, 8) == 0


def test_the_scale_has_a_least_and_a_largest_reach() -> None:
    assert shades_for([]).reach == shades_for([(9, 8)]).reach == REACH[0]
    assert shades_for([(80, 8)]).reach == shades_for([(0, 8)]).reach == REACH[1]
    assert shades_for([(80, 8)]).strength(80, 8) == 1


def test_rank_zero_is_all_lost() -> None:
    shades = shades_for([(0, 8)])
    assert shades.strength(0, 8) == -1
    assert shades.strength(0, 0) == 0


def test_paint_tells_direction_and_strength() -> None:
    assert paint(0.5) == {"class_": "up", "fill_opacity": 0.5}
    assert paint(-0.25) == {"class_": "down", "fill_opacity": 0.25}
    assert paint(0.0)["class_"] == "same"


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return WCAG's contrast ratio of two colours."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_every_colour(theme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[theme]
    colours = {
        name: tuple(int(code[n : n + 2], 16) / 255 for n in (0, 2, 4))
        for name, code in re.findall(r"--(\w+): #(\w{6});", block)
    }
    ink, ground = colours["ink"], colours["ground"]
    for side in ("up", "down"):
        for strength in (0, 0.25, 0.5, 0.75, 1):
            pairs = zip(colours[side], ground, strict=True)
            mixed = tuple(strength * a + (1 - strength) * b for a, b in pairs)
            assert contrast(ink, mixed) >= 4.5, (side, strength)
    for name in ("ink", "soft", "good", "bad", "training", "validation"):
        assert contrast(colours[name], colours["paper"]) >= 4.3, name
