"""Parameters that FSDP2 or DeepSpeed shards across processes: read whole by all, write back."""

from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from dynlora.engines import deepspeed


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process may have only a part of the tensor."""
    return _is_distributed(tensor) or deepspeed.is_partitioned(tensor)


def is_held(parameter: Parameter) -> bool:
    """Return whether an engine manages a parameter and fixes its shape."""
    return is_sharded(parameter) or deepspeed.is_copied(parameter)


def is_there(saved: Tensor) -> bool:
    """Return whether a saved tensor has values; DeepSpeed saves empty placeholders."""
    return saved.numel() > 0


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered from all processes; with ZeRO its trained copy."""
    if deepspeed.is_partitioned(tensor) or deepspeed.is_copied(tensor):
        return deepspeed.whole_copy(tensor)
    sharded: Any = tensor
    return sharded.full_tensor() if _is_distributed(tensor) else tensor


def sharded_as(target: Tensor, values: Tensor) -> Tensor:
    """Return whole values, present on every process, sharded like a tensor of their shape."""
    if not _is_distributed(target):
        return values
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    # Each process slices its own values, without communication.
    return distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=None)


def overwrite(parameter: Parameter, values: Tensor) -> None:
    """Write whole values, present on every process, into a parameter's memory."""
    if deepspeed.is_copied(parameter):
        deepspeed.write(parameter, values)
    else:
        parameter.data.copy_(sharded_as(parameter, values))
    parameter.grad = None


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward without backward, which it keeps for its root.

    Otherwise the next forward uses these copies instead of overwritten shards.
    """
    for module in model.modules():
        sharded: Any = module
        if hasattr(module, "set_reshard_after_forward"):  # only FSDP2's modules
            sharded.reshard()


def gradient_of(parameter: Parameter) -> Tensor | None:
    """Return a parameter's gradient, possibly sharded; None if missing."""
    return deepspeed.gradient(parameter) if deepspeed.is_copied(parameter) else parameter.grad


def has_gradient(parameter: Parameter) -> bool:
    """Return whether a parameter has a gradient."""
    if deepspeed.is_copied(parameter):
        return deepspeed.has_gradient(parameter)
    return parameter.grad is not None


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # not every build of torch has DTensor
