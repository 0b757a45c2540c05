"""Engines that fix shapes are refused by name; a plain model passes."""

import pytest
import torch
from torch import nn

from dynlora.engines.checks import check_engine
from dynlora.engines.compiled import is_compiled
from dynlora.engines.ddp import unwrapped
from dynlora.errors import EngineError
from tests.lora_layers import lora_chain


def test_a_compiled_model_passes_and_is_told_apart_and_unwrapped():
    plain = lora_chain(6, 5)
    compiled = torch.compile(plain, backend="eager")
    check_engine(compiled)
    assert (is_compiled(plain), is_compiled(compiled)) == (False, True)
    assert unwrapped(compiled) is unwrapped(plain) is plain


def test_a_model_of_which_a_part_is_compiled_or_was_replaced_is_told_apart():
    in_place, replaced = lora_chain(6, 5), lora_chain(6, 5)
    in_place.base_model.model[0].compile(backend="eager")
    layers = replaced.base_model.model
    layers[0] = torch.compile(layers[0], backend="eager")
    for model in (in_place, replaced):
        assert is_compiled(model)
        assert unwrapped(model) is model


@pytest.mark.parametrize("name", ["DeepSpeedEngine", "FullyShardedDataParallel"])
def test_engines_that_need_not_be_installed_are_refused_by_their_name(name):
    engine = type(name, (nn.Module,), {"__module__": "some.engine"})
    with pytest.raises(EngineError, match=rf"got some\.engine\.{name}\. With DeepSpeed"):
        check_engine(engine())
