"""Names and patterns of layers: matched as PEFT does, sorted by number, or refused."""

import time

import pytest
from peft.utils.other import get_pattern_key

from dynlora.adapter_files.names import match_names, natural_key
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
        {"layers.1.q_proj": 1, "q_proj": 2},
        {r"^model\.layers\.0\.q_proj": 1, ".*": 2},
        {"layers": 1, r"layers\.(0|1)\..*": 2},
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
        ("(", r"`rank_pattern` must be a regular expression, but got '\('"),
        ("(?i)x", "global flags not at the start"),
        ("a{99999999999}", "repetition number is too large"),
        ("(" * 1500, "recursion"),
        ("x" * 2001, r"at most 2000 characters, but got one of 2001 in here"),
        ("(a|a)*[bc]", r"within 0\.05 s, but got '\(a\|a\)\*\[bc\]' in here"),
    ],
    ids=lambda value: value[:20],
)
def test_a_key_that_is_no_pattern_or_never_ends_is_refused(key, told):
    with pytest.raises(AdapterError, match=told):
        match({"q_proj": 1, key: 2}, ["a" * 60])


def test_too_many_patterns_are_refused_soon_and_one_per_layer_is_read(monkeypatch):
    ranks = {f"model.layers.{number}.q_proj": 1 + number % 7 for number in range(200)}
    escaped = {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items()}
    assert match(escaped, list(ranks)) == ranks
    monkeypatch.setattr("dynlora.adapter_files.names.SECONDS_OF_ALL", 0.2)
    many = {f"layers.{number}.q_proj": 1 for number in range(100_001)}
    started = time.process_time()
    with pytest.raises(AdapterError, match=r"within 0\.2 s, but got 100001 keys and 45 layers"):
        match(many, NAMES)
    assert time.process_time() - started < 1


def test_layers_are_sorted_by_their_numbers_whatever_the_text():
    names = ["m.0.q", "m.2.q", "m.10.k", "m.10.q", "m.head", "x"]
    assert sorted(sorted(names), key=natural_key) == names
    # Digits that are not decimal, and more of them than Python parses.
    odd = ["", "m.²", "m.٣", f"m.{'9' * 5001}", f"m.{'9' * 5000}", "m.007"]
    ordered = sorted(odd, key=natural_key)
    assert ordered.index(f"m.{'9' * 5000}") < ordered.index(f"m.{'9' * 5001}")
