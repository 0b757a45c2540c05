"""Parameters that FSDP2 or DeepSpeed shards across processes: read whole by all, write back."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dynlora.engines import deepspeed, fsdp


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process may have only a part of the tensor."""
    return fsdp.is_distributed(tensor) or deepspeed.is_partitioned(tensor)


def is_held(parameter: Parameter) -> bool:
    """Return whether an engine manages a parameter."""
    return fsdp.is_distributed(parameter) or deepspeed.is_held(parameter)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered from all processes; with ZeRO its trained copy."""
    if deepspeed.is_held(tensor):
        return deepspeed.whole_copy(tensor)
    sharded: Any = tensor
    return sharded.full_tensor() if fsdp.is_distributed(tensor) else tensor


def sharded_as(target: Tensor, values: Tensor) -> Tensor:
    """Return whole values of any shape, present on every process, sharded like a tensor."""
    if not fsdp.is_distributed(target):
        return values
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    # Each process slices its own values, without communication.
    own = distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=None)
    return own.clone()  # a slice keeps the whole values in memory


@torch.no_grad()
def write(parameter: Parameter, values: Tensor) -> None:
    """Give a parameter whole values, present on every process, of its shape or another."""
    parameter.grad = None
    if deepspeed.is_copied(parameter):
        deepspeed.write(parameter, values)
    elif values.shape == deepspeed.shape_of(parameter):
        # In place, because engines and compiled code refer to the tensor's memory.
        parameter.data.copy_(sharded_as(parameter, values))
    else:
        values = values.to(parameter.dtype).contiguous()
        _drop_accumulator(parameter)
        if fsdp.is_distributed(parameter):
            fsdp.shard_again(parameter, values)
        else:
            parameter.data = values


def _drop_accumulator(parameter: Parameter) -> None:
    """Drop the parameter's gradient accumulator, which expects the old shape.

    A referenced backward graph (a loop that keeps `loss`) retains it, and the next backward pass
    would raise. torch drops the accumulator when the dtype of `.data` changes.
    """
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = parameter.data.to(other)


def gradient_of(parameter: Parameter) -> Tensor | None:
    """Return a parameter's gradient, possibly sharded; None if missing."""
    return deepspeed.gradient(parameter) if deepspeed.is_copied(parameter) else parameter.grad


def has_gradient(parameter: Parameter) -> bool:
    """Return whether a parameter has a gradient."""
    if deepspeed.is_copied(parameter):
        return deepspeed.has_gradient(parameter)
    return parameter.grad is not None
