"""Patterns of layers' names: PEFT finds every value, with few keys."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from dynlora.adapters.patterns import name_patterns

MOST_COMPILED = 512
"""Patterns that Python keeps compiled: `re._MAXCACHE`."""
names = st.text("ab.x0(|)$^\\ ", min_size=1, max_size=6)


@given(st.dictionaries(names, st.integers(1, 3), min_size=1))
def test_peft_finds_the_value_of_every_layer_and_of_no_other(values):
    named = {name: value for index, (name, value) in enumerate(values.items()) if index % 2}
    patterns = name_patterns(named, 1)
    for name in values:
        key = get_pattern_key(patterns.keys(), name)
        assert patterns.get(key, 1) == named.get(name, 1)


@pytest.mark.parametrize("layers", [560, 2401])
@pytest.mark.parametrize("ranks", [2, 32])
def test_both_patterns_of_a_large_model_fit_the_cache_of_compiled_patterns(layers, ranks):
    names = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(layers)]
    held = {name: 1 + index % ranks for index, name in enumerate(names)}
    ranked = name_patterns(held, 8)
    scaled = name_patterns({name: 1.5 * rank for name, rank in held.items()}, 12)
    assert len({*ranked, *scaled}) < MOST_COMPILED / 2
    assert max(map(len, ranked)) <= 2000
    for name, rank in held.items():
        assert [ranked[key] for key in ranked if re.match(key, name)] == [rank] * (rank != 8)


def test_a_name_longer_than_a_key_may_be_gets_a_key_alone():
    values = {"a" * 1990: 2, "b" * 2100: 2, "c": 2, "d" * 6: 2}
    assert list(name_patterns(values, 1)) == [
        f"^({'a' * 1990})$", f"^({'b' * 2100})$", f"^(c|{'d' * 6})$"
    ]  # fmt: skip
