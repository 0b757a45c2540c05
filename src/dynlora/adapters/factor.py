"""One of the two factors of a LoRA layer: a PEFT parameter of any layout, read as a matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dynlora.adapters.sharding import gradient_of, shape_of, whole


@dataclass(frozen=True, slots=True)
class Factor:
    """A parameter, and how tensors of its layout (gradients, moments) become matrices and back."""

    holder: Any
    """The module that holds the parameter and loads it."""
    key: str
    """The parameter's name in its holder."""
    rank_axis: int
    """The parameter's axis of size r."""
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]

    @property
    def parameter(self) -> Parameter:
        """What PEFT and the optimizer hold."""
        parameter: Parameter = getattr(self.holder, self.key)  # `get_parameter` parses dotted names
        return parameter

    @property
    def size(self) -> int:
        """The rank that the parameter has room for; more than the live one in static mode."""
        return int(shape_of(self.parameter)[self.rank_axis])

    @property
    def width(self) -> int:
        """The side of the matrix that is not the rank."""
        shape = shape_of(self.parameter)
        matrix = self.to_matrix(torch.empty(shape, device="meta"))
        return matrix.numel() // self.size

    def live(self, tensor: Tensor, rank: int) -> Tensor:
        """Return the first `rank` components of a tensor of the parameter's layout, as a matrix."""
        tensor = whole(tensor)
        if tensor.shape[self.rank_axis] > rank:  # in static mode
            tensor = tensor.narrow(self.rank_axis, 0, rank)
        return self.to_matrix(tensor)

    def matrix(self, rank: int) -> Tensor:
        """Return the first `rank` components as a matrix; if whole, in the parameter's memory."""
        return self.live(self.parameter, rank)

    def gradient(self, rank: int) -> Tensor:
        """Return their gradient as a matrix; zeros where no backward pass left one."""
        gradient = gradient_of(self.parameter)
        if gradient is None:
            return torch.zeros_like(self.matrix(rank))
        # Sums over a tensor depend on its strides, and a reloaded one is contiguous.
        return self.live(gradient, rank).contiguous()

    def padded(self, matrix: Tensor, size: int) -> Tensor:
        """Return a matrix in the parameter's layout, with components of zeros up to `size`."""
        data = self.from_matrix(matrix)
        rank = data.shape[self.rank_axis]
        if rank == size:
            return data.contiguous()
        shape = list(data.shape)
        shape[self.rank_axis] = size
        whole = data.new_zeros(shape)
        whole.narrow(self.rank_axis, 0, rank).copy_(data)
        return whole


def same(tensor: Tensor) -> Tensor:
    """Return the tensor: the parameter is the matrix."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """Return the transpose of a matrix."""
    return tensor.T
