"""Patterns of names: what they match, and which are refused."""

import pytest
from peft.utils.other import get_pattern_key

from dynlora.errors import AdapterError
from dynlora.saved.patterns import compile_patterns

NAMES = [
    f"{prefix}layers.{number}.{leaf}"
    for prefix in ("", "model.", "model.language_model.")
    for number in (0, 1, 10)
    for leaf in ("self_attn.q_proj", "mlp.q_proj", "q_proj", "xq_proj", "q_projx")
]


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1},
        {"layers.1.q_proj": 1, "q_proj": 2},
        {r"layers\.1\.self_attn\.q_proj": 1},
        {r"^model\.layers\.0\.q_proj": 1, ".*": 2},
        {"layers": 1, r"layers\.(0|1)\..*": 2},
        {"a|q_proj": 1},
        {"": 1},
        {},
    ],
    ids=str,
)
def test_patterns_match_as_in_peft(patterns):
    compiled = compile_patterns(patterns, "rank_pattern", "here")
    for name in NAMES:
        expected = patterns.get(get_pattern_key(patterns.keys(), name), 0)
        assert compiled.value_of(name, 0) == expected, name


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("(", r"regular expression, got '\('.*rank_pattern|rank_pattern.*got '\('"),
        ("(?i)x", "global flags not at the start"),
        ("a{99999999999}", "repetition number is too large"),
        ("(" * 1500, "recursion"),
        ("x" * 2001, r"at most 2000 characters, got one of 2001 in here"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_pattern_is_refused(key, told):
    with pytest.raises(AdapterError, match=told):
        compile_patterns({"q_proj": 1, key: 2}, "rank_pattern", "here")


def test_a_pattern_that_would_take_for_ever_is_stopped():
    patterns = compile_patterns({"(a|a)*[bc]": 1}, "rank_pattern", "here")
    with pytest.raises(AdapterError, match=r"within 0\.05 s, got '\(a\|a\)\*\[bc\]' in here"):
        patterns.value_of("a" * 60, 0)
