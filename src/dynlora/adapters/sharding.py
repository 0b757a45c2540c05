"""Parameters of which an engine holds parts on each process: read whole, write back.

Those of FSDP2 are tensors of a kind of their own (DTensors), those of DeepSpeed's ZeRO have marks
(see `deepspeed`). Reading one is a collective: every process must come by. Plain tensors pass
through untouched.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dynlora.adapters import deepspeed


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process may hold a part only."""
    return _is_distributed(tensor) or deepspeed.is_partitioned(tensor)


def is_held(parameter: Parameter) -> bool:
    """Return whether an engine has taken a parameter over, and with it its shape."""
    return is_sharded(parameter) or deepspeed.is_copied(parameter)


def shape_of(parameter: Parameter) -> torch.Size:
    """Return the shape that a parameter has as a whole."""
    return deepspeed.shape_of(parameter)


def is_there(saved: Tensor) -> bool:
    """Return whether what was saved of a parameter is more than DeepSpeed's sign that it is not."""
    return saved.numel() > 0


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor with the parts of all processes; what is trained, if that is a copy."""
    if deepspeed.is_partitioned(tensor) or deepspeed.is_copied(tensor):
        return deepspeed.whole_copy(tensor)
    sharded: Any = tensor
    return sharded.full_tensor() if _is_distributed(tensor) else tensor


def sharded_as(target: Tensor, values: Tensor) -> Tensor:
    """Return values that every process has whole, sharded as a tensor of their shape is."""
    if not _is_distributed(target):
        return values
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    # Every process takes its part of what it has: nothing is sent.
    return distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=None)


def overwrite(parameter: Parameter, values: Tensor) -> None:
    """Put values that every process has whole in the place of a parameter's, in its own memory."""
    if deepspeed.is_copied(parameter):
        deepspeed.write(parameter, values)
    else:
        parameter.data.copy_(sharded_as(parameter, values))
    parameter.grad = None


def gradient_of(parameter: Parameter) -> Tensor | None:
    """Return a parameter's gradient, which may be sharded; None where no backward left one."""
    return deepspeed.gradient(parameter) if deepspeed.is_copied(parameter) else parameter.grad


def has_gradient(parameter: Parameter) -> bool:
    """Return whether a backward pass has left a gradient."""
    if deepspeed.is_copied(parameter):
        return deepspeed.has_gradient(parameter)
    return parameter.grad is not None


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # not every build of torch has the class to ask for
