"""What DeepSpeed's marks on a parameter say, and which of its optimizers are refused, by stand-ins.

`tests/distributed/test_engines.py` shows the real ones, where DeepSpeed is installed.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, AdamW

from dynlora.adapters.optimizer_state import check_holds, unwrap_optimizer
from dynlora.engines.deepspeed import (
    call_before_step,
    check_zero,
    has_gradient,
    is_copied,
    is_partitioned,
    is_zero,
    shape_of,
)
from dynlora.errors import OptimizerError
from tests.lora_layers import layers_of, lora_chain


@pytest.fixture
def parameters():
    return [p for layer in layers_of(lora_chain(6, 5, 4)) for p in layer.parameters]


def zero_optimizer(
    groups, *, kind="DeepSpeedZeroOptimizer", inner=AdamW, dtype=torch.float32, offloads=False
):
    """Return what looks like DeepSpeed's optimizer of these groups of parameters."""
    optimizer = type(kind, (), {"__module__": "deepspeed.runtime.zero.some"})()
    optimizer.optimizer = inner([torch.zeros(1)], lr=0.1)
    optimizer.dtype = dtype
    optimizer.param_groups, optimizer.state = [{} for _ in groups], {}
    optimizer.cpu_offload = optimizer.offload_optimizer = offloads
    optimizer.bit16_groups = optimizer.fp16_groups = groups
    return optimizer


def test_a_partitioned_parameter_has_its_whole_shape_and_a_copy_unless_it_is_frozen(parameters):
    assert not any(is_partitioned(p) or is_copied(p) for p in parameters)
    assert not is_zero(AdamW(parameters))
    parameter, shape = parameters[0], parameters[0].shape
    assert shape_of(parameter) == shape
    parameter.ds_id, parameter.ds_shape, parameter.data = 0, shape, torch.empty(0)
    assert is_partitioned(parameter)
    assert is_copied(parameter)
    assert shape_of(parameter) == shape
    assert not is_copied(parameter.requires_grad_(False))


def test_a_gradient_is_there_while_deepspeed_holds_one_for_the_group(parameters):
    parameters[0]._hp_mapping = SimpleNamespace(gradient_dict={0: []}, param_group_index=0)
    parameters[1]._hp_mapping = SimpleNamespace(gradient_dict={1: None}, param_group_index=1)
    assert has_gradient(parameters[0])
    assert not has_gradient(parameters[1])


def test_what_is_called_before_a_step_sees_it_come_until_it_is_removed():
    calls = []
    kind = type("Zero", (), {"step": lambda self, closure=None: calls.append(f"step {closure}")})
    optimizer = kind()
    remove = call_before_step(optimizer, lambda: calls.append("before"))
    optimizer.step(closure=1)
    remove()
    optimizer.step()
    assert calls == ["before", "step 1", "step None"]


@pytest.mark.parametrize("kind", ["DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"])
def test_an_optimizer_with_a_group_for_each_parameter_passes(parameters, kind):
    optimizer = zero_optimizer([[p] for p in parameters], kind=kind)
    assert unwrap_optimizer(optimizer) is optimizer
    check_holds(optimizer, parameters)


def test_parameters_in_a_shared_group_or_in_none_are_refused(parameters):
    with pytest.raises(OptimizerError, match=r"got a group of 4: build the .*AdamW\(\[\{'params'"):
        check_zero(zero_optimizer([parameters]), parameters)
    with pytest.raises(OptimizerError, match="all 4 LoRA parameters, got 3 that it does not"):
        check_zero(zero_optimizer([parameters[:1]]), parameters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "BF16_Optimizer"}, "got BF16_Optimizer of torch.float32"),
        ({"dtype": torch.float16}, "got DeepSpeedZeroOptimizer of torch.float16"),
        ({"inner": SGD}, "got torch.optim.sgd.SGD, not offloaded"),
        ({"offloads": True}, "got torch.optim.adamw.AdamW, offloaded"),
    ],
)
def test_optimizers_that_ranks_cannot_follow_are_refused_by_name(parameters, settings, message):
    with pytest.raises(OptimizerError, match=message):
        check_zero(zero_optimizer([[p] for p in parameters], **settings), parameters)


def test_the_optimizer_that_deepspeed_was_given_is_refused_for_the_one_it_returned(parameters):
    for parameter in parameters:
        parameter._hp_mapping = None
    optimizer = AdamW([torch.zeros(1)])
    with pytest.raises(OptimizerError, match=r"optimizer is AdamW: give the one that `deepspeed"):
        check_holds(optimizer, parameters)
