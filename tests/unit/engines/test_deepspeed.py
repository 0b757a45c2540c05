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
    step_parameters_apart,
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
    copies = [None for _ in groups]
    optimizer.single_partition_of_fp32_groups = optimizer.fp32_partitioned_groups_flat = copies
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
def test_an_optimizer_of_all_parameters_passes(parameters, kind):
    optimizer = zero_optimizer([parameters[:3], parameters[3:]], kind=kind)
    assert unwrap_optimizer(optimizer) is optimizer
    check_holds(optimizer, parameters)


def test_parameters_in_no_group_are_refused(parameters):
    with pytest.raises(OptimizerError, match="all 4 LoRA parameters, got 3 that it does not"):
        check_zero(zero_optimizer([parameters[:1]]), parameters)


def test_the_parts_of_a_copy_are_stepped_with_the_number_of_steps_of_their_parameter(parameters):
    """As AdamW steps separate parameters."""
    torch.manual_seed(0)
    size, steps = 5, (2.0, 10.0)
    copy, grad, first, second = torch.randn(4, 2 * size).split(1)
    copy, second = torch.nn.Parameter(copy[0]), second.square()
    copy.grad = grad[0]
    zero = zero_optimizer([parameters[:3]])
    zero.single_partition_of_fp32_groups = [copy]
    inner = zero.optimizer = AdamW([copy], lr=0.1)
    for place, parameter in enumerate(parameters[:2]):
        address = SimpleNamespace(start=place * size, numel=size)
        parameter._hp_mapping = SimpleNamespace(hp_fragment_address=address)
    parameters[2]._hp_mapping = None  # on another process
    moments = {"exp_avg": first[0].clone(), "exp_avg_sq": second[0].clone()}
    inner.state[copy] = moments | {"step": torch.tensor([*steps, 1.0])}
    zero.state = inner.state
    apart = [torch.nn.Parameter(part.clone()) for part in copy.detach().split(size)]
    reference = AdamW(apart, lr=0.1)
    for place, (part, step) in enumerate(zip(apart, steps, strict=True)):
        within = slice(place * size, (place + 1) * size)
        part.grad = copy.grad[within].clone()
        state = {key: value[within].clone() for key, value in moments.items()}
        reference.state[part] = state | {"step": torch.tensor(step)}
    step_parameters_apart(zero)
    for _ in range(2):
        inner.step()
        reference.step()
    assert torch.equal(copy, torch.cat(apart))
    assert inner.param_groups[0]["params"] == [copy]
    assert list(inner.state) == [copy]
    assert inner.state[copy]["step"].tolist() == [4.0, 12.0, 3.0]


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
