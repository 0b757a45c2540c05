"""A model split over devices in one process, as by `device_map`, trains as on one device."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dynlora.adapters import layers
from dynlora.importance.agreement import AgreementTest
from tests.models import adamw, attached, lora_llama, sequences, train
from tests.second_device import SECOND, SecondDevice

STEPS = 8
SETTINGS = {
    "importance": "sensitivity",
    "layer_weights": True,
    "feature_weight": 1.0,
    "budget_end": 0.5,
    "hysteresis": 0,
    "shrink_tolerance": 1.0,
}


def move(module, device):
    """Move a block, its inputs, and its outputs back, as Accelerate's hooks do."""

    def to(place, values):
        return tree_map_only(Tensor, lambda tensor: tensor.to(place), values)

    module.to(device)
    module.register_forward_pre_hook(lambda _, *given: to(device, given), with_kwargs=True)
    module.register_forward_hook(lambda _, args, output: to("cpu", output))


def trained(device):
    torch.manual_seed(0)
    model = lora_llama().double().train()
    model.config.use_cache = False
    move(model.base_model.model.model.layers[1], device)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=STEPS, **SETTINGS)
    train(model, optimizer, dynamic, STEPS, sequences(batch=4, length=6))
    return model, optimizer, dynamic


def test_a_split_model_ends_as_on_one_device_and_stays_where_it_was(monkeypatch):
    # The simulated device has a tensor class of its own, as sharded tensors have.
    monkeypatch.setattr(layers, "check_sharding", lambda parameter: None)
    monkeypatch.setattr(AgreementTest, "is_significant", lambda self: True)
    whole, _, expected = trained(torch.device("cpu"))
    with SecondDevice():
        split, optimizer, dynamic = trained(SECOND)
        assert dynamic.ranks == expected.ranks
        assert len(set(dynamic.ranks.values())) > 1
        for mine, theirs in zip(split.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-6, atol=1e-9)
    for name, parameter in split.named_parameters():
        assert parameter.device == (SECOND if ".layers.1." in name else torch.device("cpu"))
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].device == parameter.device
        assert state["exp_avg"].shape == parameter.shape
