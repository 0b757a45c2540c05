"""Parameters of which each process holds a part (FSDP2's DTensors): read whole, write back.

Reading one is a collective: every process must come by. Plain tensors pass through untouched.
"""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process may hold a part only."""
    return hasattr(tensor, "full_tensor")  # not every build of torch has the class to ask for


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor with the parts of all processes."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def sharded_as(target: Tensor, values: Tensor) -> Tensor:
    """Return values that every process has whole, sharded as a tensor of their shape is."""
    if not is_sharded(target):
        return values
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    # Every process takes its part of what it has: nothing is sent.
    return distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=None)
