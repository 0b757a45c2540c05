"""Markdown: tables that are aligned raw, and names that stay what they are."""

import pytest

from benchmarks.harness.report.markdown import MOST_OF_ERROR, error_text, escape, seeds_text, table


def test_a_table_is_aligned_words_on_the_left_and_numbers_on_the_right():
    assert table(["method", "n"], [["lora", "10"], ["a", "9,999"]]) == [
        "| method |     n |",
        "| ------ | ----: |",
        "| lora   |    10 |",
        "| a      | 9,999 |",
        "",
    ]


def test_every_line_of_a_table_is_as_wide_as_the_others_in_any_script():
    lines = table(["a", "b", "c"], [["方法", "−1", "±"], ["x", "", "–"]], words=2)
    wide = sum(character in "方法" for character in lines[2])
    assert {len(line) for n, line in enumerate(lines[:-1]) if n != 2} == {len(lines[2]) + wide}


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("dynamic_spectral-2.5", "dynamic_spectral-2.5"),
        ("_a_ b_", r"\_a\_ b\_"),
        ("a|b*c`d", r"a\|b\*c\`d"),
        ("<b>[x](y)", r"\<b\>\[x\](y)"),
        ("two\n lines\t", "two lines"),
        ("$x$ ~y~ #1 &amp; !", r"\$x\$ \~y\~ \#1 \&amp; \!"),
        ("\\", "\\\\"),
    ],
)
def test_signs_that_mean_something_to_markdown_are_escaped(text, escaped):
    assert escape(text) == escaped


def test_a_long_error_is_cut():
    assert error_text("x" * 1000) == "x" * (MOST_OF_ERROR - 1) + "…"
    assert error_text("no\nluck |") == r"no luck \|"


def test_seeds_are_sorted():
    assert seeds_text([3]) == "seed 3"
    assert seeds_text([7, 3]) == "seeds 3, 7"
