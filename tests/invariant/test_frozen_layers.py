"""A LoRA layer whose weights are frozen stays as it is, rank included; the others share the rest.

Its optimizer is the one that a Trainer makes: of what is trained.
"""

import pytest
import torch
from torch.optim import AdamW

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.errors import LayerError
from tests.models import adamw, attached, lora_llama, train

MOVING = {"events": 10, "last_event": 1.0, "hysteresis": 0, "shrink_tolerance": 1.0}


def first_block(model):
    """Return the parameters of the first block's adapters, which add something."""
    found = {n: p for n, p in model.named_parameters() if "layers.0." in n and "lora_" in n}
    for name, parameter in found.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return list(found.values())


def frozen(parameters):
    for parameter in parameters:
        parameter.requires_grad_(False)
    return [parameter.detach().clone() for parameter in parameters]


def test_frozen_layers_keep_rank_scale_and_weights_bit_for_bit_and_the_others_share_the_rest():
    model = lora_llama().train()
    parameters = first_block(model)
    before = frozen(parameters)
    optimizer = adamw(model)
    # Scores that frozen layers have as well, and weights that would change their scale.
    settings = {"importance": "magnitude", "layer_weights": True}
    dynamic = attached(model, optimizer, total_steps=30, **settings, **MOVING)
    assert len(before) == 14
    train(model, optimizer, dynamic, 30)
    assert all(torch.equal(one, other) for one, other in zip(before, parameters, strict=True))
    kept = [layer for layer in dynamic._layers if "layers.0." in layer.name]
    assert {(layer.r, layer.scaling) for layer in kept} == {(4, 2.0)}
    assert len({layer.r for layer in dynamic._layers if layer not in kept}) > 2
    spent = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert 0 <= dynamic.budget - spent < min(layer.cost for layer in dynamic._layers)


def test_a_layer_frozen_in_the_middle_of_a_run_stays_from_there_and_moves_once_it_thaws():
    model = lora_llama().train()
    parameters = first_block(model)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=60, importance="random", **MOVING)

    def ranks():
        return [rank for name, rank in dynamic.ranks.items() if "layers.0." in name]

    train(model, optimizer, dynamic, 20)
    assert len(set(ranks())) > 1
    before, weights = ranks(), frozen(parameters)
    train(model, optimizer, dynamic, 20)
    assert ranks() == before
    assert all(torch.equal(one, other) for one, other in zip(weights, parameters, strict=True))
    for parameter in parameters:
        parameter.requires_grad_(True)
    train(model, optimizer, dynamic, 20)
    assert ranks() != before


@pytest.mark.parametrize("trained", ["none", "lora_A", "lora_B"])
def test_a_model_without_a_layer_that_is_trained_whole_is_refused_with_what_trains_it(trained):
    model = lora_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    message = r"At least one of 14 LoRA layers must be trained, .* `is_trainable=True`"
    with pytest.raises(LayerError, match=message):
        DynamicLora(model, AdamW(model.parameters()), DynamicLoraConfig())
