"""Parameters of DeepSpeed's ZeRO optimizers, which train float32 copies: read whole, write back.

All access is collective, because each process has only parts of copies, moments and (at stage 3)
parameters. DeepSpeed is imported only if it has marked a parameter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dynlora.errors import OptimizerError

_ZERO = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")


@runtime_checkable
class ZeroOptimizer(Protocol):
    """DeepSpeed's wrapper of an optimizer, which is not a `torch.optim.Optimizer`."""

    optimizer: Optimizer
    param_groups: list[dict[str, Any]]
    state: dict[Any, Any]


AnyOptimizer = Optimizer | ZeroOptimizer


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether stage 3 partitions a parameter, trained or frozen."""
    return hasattr(tensor, "ds_id")


def is_copied(tensor: Tensor) -> bool:
    """Return whether ZeRO trains a float32 copy of a parameter."""
    return hasattr(tensor, "_hp_mapping") or (is_partitioned(tensor) and tensor.requires_grad)


def is_held(parameter: Tensor) -> bool:
    """Return whether ZeRO manages a parameter, and fixes its shape."""
    return is_partitioned(parameter) or is_copied(parameter)


def is_zero(optimizer: object) -> bool:
    """Return whether an optimizer is DeepSpeed's."""
    return type(optimizer).__module__.startswith("deepspeed.runtime.")


def shape_of(parameter: Parameter) -> torch.Size:
    """Return the shape of the whole parameter."""
    held: Any = parameter
    shape: torch.Size = held.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


def whole_copy(parameter: Tensor) -> Tensor:
    """Return the trained copy, or the whole values of a frozen stage 3 parameter."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if is_copied(parameter):
        copy: Tensor = safe_get_full_fp32_param(parameter)
        return copy
    with GatheredParameters([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def write(parameter: Parameter, values: Tensor) -> None:
    """Write whole values, present on every process, to the copy and to the parameter."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, values)
    with GatheredParameters([parameter], modifier_rank=0):  # does nothing below stage 3
        parameter.data.copy_(values)


def gradient(parameter: Parameter) -> Tensor | None:
    """Return the gradient reduced over processes; None if missing."""
    from deepspeed.utils import safe_get_full_grad

    if not has_gradient(parameter):
        return None
    found: Tensor = safe_get_full_grad(parameter)
    return found


def has_gradient(parameter: Parameter) -> bool:
    """Return whether there is a gradient, from `engine.backward` until `engine.step`."""
    held: Any = parameter
    if is_partitioned(parameter):
        optimizer = held._z3_optimizer
        place = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
        return optimizer.averaged_gradients.get(place) is not None
    mapping = held._hp_mapping
    if mapping is None:  # this process has no part, so that others decide
        return True
    return mapping.gradient_dict.get(mapping.param_group_index) is not None


def call_before_step(optimizer: Any, call: Callable[[], None]) -> Callable[[], None]:
    """Call a function before each step, while gradients exist; return a function to undo this.

    For loops without code between the engine's backward and its step.
    """
    step = optimizer.step

    def observed_step(*args: Any, **kwargs: Any) -> Any:
        call()
        return step(*args, **kwargs)

    optimizer.step = observed_step
    return lambda: delattr(optimizer, "step")


def check_zero(optimizer: Any, parameters: Sequence[Parameter]) -> None:
    """Raise `OptimizerError` unless the moments of these parameters can follow a change of rank."""
    kind = type(optimizer).__name__
    if kind not in _ZERO or optimizer.dtype == torch.float16:
        raise OptimizerError(
            "DeepSpeed's optimizer must be that of ZeRO 1, 2 or 3 in float32 or bfloat16, got "
            f"{kind} of {optimizer.dtype}: set `zero_optimization.stage` and no `fp16`."
        )
    inner = type(optimizer.optimizer)
    offloads = optimizer.offload_optimizer if _is_stage3(optimizer) else optimizer.cpu_offload
    if inner not in (torch.optim.Adam, torch.optim.AdamW) or offloads:
        where = "offloaded" if offloads else "not offloaded"
        raise OptimizerError(
            "Under DeepSpeed the optimizer must be torch.optim.Adam or AdamW where the model is, "
            f"got {inner.__module__}.{inner.__name__}, {where}: give `deepspeed.initialize` one of "
            "them, and leave `optimizer` and `offload_optimizer` out of its configuration."
        )
    groups = _groups(optimizer)
    owners = [next((g for g in groups if any(p is q for q in g)), []) for p in parameters]
    missing = sum(not owner for owner in owners)
    if missing:
        raise OptimizerError(
            f"DeepSpeed must train all {len(parameters)} LoRA parameters, got {missing} that it "
            "does not: give `deepspeed.initialize` this model, and an optimizer of its parameters."
        )
    largest = max(len(owner) for owner in owners)
    if largest > 1:
        raise OptimizerError(
            "Each LoRA parameter must be in a group of its own under DeepSpeed, whose optimizers "
            f"count the steps of a group alone, got a group of {largest}: build the optimizer as "
            "`AdamW([{'params': [p]} for p in model.parameters() if p.requires_grad])`, in a "
            "Trainer by `optimizer_cls_and_kwargs` (docs/scaling.md)."
        )


def group_of(optimizer: Any, parameter: Parameter) -> dict[str, Any]:
    """Return the settings of a parameter's group."""
    place = _place(optimizer, parameter)
    if is_partitioned(parameter):
        place = optimizer.sub_group_to_group_id[place]
    group: dict[str, Any] = optimizer.param_groups[place]
    return group


@contextmanager
def state_of(optimizer: Any, parameter: Parameter) -> Iterator[dict[str, Any]]:
    """Yield a parameter's state with whole moments, and write them back afterwards.

    The number of steps is the optimizer's own tensor: change it in place.
    """
    from deepspeed.utils import (
        lazy_init_hp_params_optimizer_state,
        safe_get_full_optimizer_state,
        safe_set_full_optimizer_state,
    )

    part = _parts(optimizer)[_place(optimizer, parameter)]
    state = optimizer.optimizer.state.get(part, {})
    moments = [key for key in state if key != "step"]
    if not is_partitioned(parameter) and moments:
        # DeepSpeed links only the moments of the first group, and no loaded ones.
        lazy_init_hp_params_optimizer_state([parameter], part, optimizer.optimizer.state)
    lent = {**state, **{key: safe_get_full_optimizer_state(parameter, key) for key in moments}}
    yield lent
    for key in moments:
        safe_set_full_optimizer_state(parameter, lent[key], key)


def _place(optimizer: Any, parameter: Parameter) -> int:
    groups = _groups(optimizer)
    return next(i for i, group in enumerate(groups) if any(p is parameter for p in group))


def _groups(optimizer: Any) -> list[list[Parameter]]:
    """Return the parameters of each part that the optimizer steps separately."""
    return list(optimizer.fp16_groups if _is_stage3(optimizer) else optimizer.bit16_groups)


def _parts(optimizer: Any) -> list[Tensor]:
    """Return this process's part of each group's copy."""
    stage3 = _is_stage3(optimizer)
    name = "fp32_partitioned_groups_flat" if stage3 else "single_partition_of_fp32_groups"
    return list(getattr(optimizer, name))


def _is_stage3(optimizer: object) -> bool:
    return type(optimizer).__name__ == _ZERO[1]
