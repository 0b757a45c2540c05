"""Patterns in PEFT's configuration: few keys, from which PEFT builds exactly the live ranks."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn

from dynlora.adapters.patterns import name_patterns
from dynlora.adapters.peft_config import write_patterns
from tests.lora_layers import layers_of, lora_chain

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


AWKWARD = ["a", "axb", "a+b", "b", "layer", "layer1", "layer10", "(x)", "proj[0]", "$y^"]


def awkward_base():
    """Return layers whose names are parts, or patterns, of one another's."""
    top, inner = ({name: nn.Linear(6, 6) for name in AWKWARD} for _ in range(2))
    return nn.ModuleDict({"outer": nn.ModuleDict({"inner": nn.ModuleDict(inner)}), **top})


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_builds_the_same_ranks_and_scales_from_the_patterns(use_rslora):
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=use_rslora, target_modules=AWKWARD)
    model = get_peft_model(awkward_base(), config)
    config.rank_pattern = {"a|b": 3}  # replaced
    layers = layers_of(model)
    assert len(layers) == 2 * len(AWKWARD)
    for index, layer in enumerate(layers):
        layer.set_fields(r=1 + index % 5, scaling=layer.scaling * (1 + index / 10))
    held = {layer.name: (layer.r, layer.scaling) for layer in layers}
    write_patterns(config, layers)
    rebuilt = layers_of(get_peft_model(awkward_base(), config))
    assert {layer.name: layer.r for layer in rebuilt} == {n: r for n, (r, _) in held.items()}
    for layer in rebuilt:
        assert layer.scaling == pytest.approx(held[layer.name][1], rel=1e-14)


def test_a_start_that_changes_the_base_is_kept_so_that_attaching_refuses_it():
    model = lora_chain(8, 8, r=4)
    config = model.peft_config["default"]
    config.init_lora_weights = "pissa"
    write_patterns(config, layers_of(model))
    assert config.init_lora_weights == "pissa"
