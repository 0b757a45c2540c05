"""Patterns in PEFT's configuration: exactly the live ranks, and PEFT builds from them the same."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora.adapters.peft_config import write_patterns
from tests.lora_layers import layers_of, lora_chain

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
