"""Engines that fix shapes are refused by name; a plain model passes."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dynlora.engines.checks import check_devices, check_engine
from dynlora.engines.compiled import check_not_compiled, is_compiled, without_compiler
from dynlora.errors import EngineError
from tests.lora_layers import layers_of, lora_chain


@pytest.fixture
def group():
    """Start process groups, and end each of them."""

    def start(backend, store, size):
        distributed.init_process_group(backend, store=store, rank=0, world_size=size)

    yield start
    distributed.destroy_process_group()


def test_a_plain_model_passes():
    check_engine(lora_chain(6, 5))


def test_a_group_of_one_process_passes(group):
    group("gloo", distributed.HashStore(), 1)
    check_engine(lora_chain(6, 5))


def test_distributed_data_parallel_is_refused(group):
    group("gloo", distributed.HashStore(), 1)
    model = DistributedDataParallel(lora_chain(6, 5))
    with pytest.raises(
        EngineError, match=r"got torch\.nn\..*\.DistributedDataParallel: ranks must be attached"
    ):
        check_engine(model)


def test_data_parallel_is_refused():
    with pytest.raises(
        EngineError, match=r"got torch\.nn\..*\.DataParallel: ranks must be attached"
    ):
        check_engine(DataParallel(lora_chain(6, 5)))


def test_a_compiled_model_passes_and_is_told_apart_and_unwrapped():
    plain = lora_chain(6, 5)
    compiled = torch.compile(plain, backend="eager")
    check_engine(compiled)
    assert (is_compiled(plain), is_compiled(compiled)) == (False, True)
    assert without_compiler(compiled) is without_compiler(plain) is plain


def test_a_model_of_which_a_part_is_compiled_in_place_is_told_apart():
    model = lora_chain(6, 5)
    model.base_model.model[0].compile(backend="eager")
    assert is_compiled(model)
    with pytest.raises(EngineError, match=r"must run without torch\.compile, got a compiled"):
        check_not_compiled(model)


def test_a_model_of_which_a_part_was_replaced_by_its_compiled_self_is_told_apart():
    model = lora_chain(6, 5)
    layers = model.base_model.model
    layers[0] = torch.compile(layers[0], backend="eager")
    assert is_compiled(model)
    assert without_compiler(model) is model


def test_layers_on_several_devices_are_refused_by_the_devices():
    model = lora_chain(6, 5, 4)
    parameters = [p for layer in layers_of(model) for p in (layer.lora_A, layer.lora_B)]
    check_devices(parameters)
    parameters[-1] = nn.Parameter(parameters[-1].to("meta"))
    with pytest.raises(EngineError, match="on one device, got cpu, meta: load the model"):
        check_devices(parameters)


@pytest.mark.parametrize("name", ["DeepSpeedEngine", "FullyShardedDataParallel"])
def test_engines_that_need_not_be_installed_are_refused_by_their_name(name):
    engine = type(name, (nn.Module,), {"__module__": "some.engine"})
    with pytest.raises(EngineError, match=rf"got some\.engine\.{name}: ranks must be attached"):
        check_engine(engine())
