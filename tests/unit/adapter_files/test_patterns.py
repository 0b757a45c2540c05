"""Patterns of names: what they match, and which are refused."""

import time

import pytest
from peft.utils.other import get_pattern_key

from dynlora.adapter_files.patterns import match_names
from dynlora.errors import AdapterError

NAMES = [
    f"{prefix}layers.{number}.{leaf}"
    for prefix in ("", "model.", "model.language_model.")
    for number in (0, 1, 10)
    for leaf in ("self_attn.q_proj", "mlp.q_proj", "q_proj", "xq_proj", "q_projx")
]


def match(patterns, names):
    return match_names(patterns, names, 0, field="rank_pattern", where="here")


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1},
        {"layers.1.q_proj": 1, "q_proj": 2},
        {r"layers\.1\.self_attn\.q_proj": 1},
        {r"^model\.layers\.0\.q_proj": 1, ".*": 2},
        {"layers": 1, r"layers\.(0|1)\..*": 2},
        {"a|q_proj": 1},
        {r"^(layers\.0\.q_proj|model\.layers\.1\.mlp\.q_proj)$": 1, "q_proj": 2},
        {"": 1},
        {},
    ],
    ids=str,
)
def test_patterns_match_as_in_peft(patterns):
    assert match(patterns, NAMES) == {
        name: patterns.get(get_pattern_key(patterns.keys(), name), 0) for name in NAMES
    }


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
        match({"q_proj": 1, key: 2}, NAMES)


def test_a_pattern_that_would_take_for_ever_is_stopped():
    with pytest.raises(AdapterError, match=r"within 0\.05 s, got '\(a\|a\)\*\[bc\]' in here"):
        match({"(a|a)*[bc]": 1}, ["a" * 60])


@pytest.mark.parametrize("first", ["q", ".*"])
def test_more_patterns_than_a_reader_waits_for_are_refused(first, monkeypatch):
    monkeypatch.setattr("dynlora.adapter_files.patterns.SECONDS_OF_ALL", 0.2)
    many = {first: 1} | {f"layers.{number}.q_proj": 1 for number in range(100_000)}
    started = time.process_time()
    with pytest.raises(AdapterError, match=r"within 0\.2 s, got 100001 keys and 45 layers in here"):
        match(many, NAMES)
    assert time.process_time() - started < 1


def test_patterns_with_one_layer_each_are_read():
    ranks = {f"model.layers.{number}.q_proj": 1 + number % 7 for number in range(600)}
    escaped = {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items()}
    assert match(escaped, list(ranks)) == ranks
