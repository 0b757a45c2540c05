"""One factor of a LoRA layer: a PEFT parameter of any layout, read as a matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dynlora.engines.deepspeed import shape_of
from dynlora.engines.sharding import gradient_of, whole


@dataclass(frozen=True, slots=True)
class Factor:
    """A parameter, and conversions of its layout to and from matrices, for moments too."""

    holder: Any
    """Module that contains the parameter and loads it."""
    key: str
    rank_axis: int
    """The parameter's axis of size r."""
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]
    rank_field: str | None = None
    """Attribute of `holder` that repeats the rank; None for embeddings."""

    @property
    def parameter(self) -> Parameter:
        """PEFT's parameter."""
        parameter: Parameter = getattr(self.holder, self.key)  # `get_parameter` parses dotted names
        return parameter

    @property
    def size(self) -> int:
        """Rank of the parameter's tensor, above the live rank if padded in static mode."""
        return int(shape_of(self.parameter)[self.rank_axis])

    @property
    def width(self) -> int:
        """Dimension of the matrix besides the rank."""
        return shape_of(self.parameter).numel() // self.size

    def live(self, tensor: Tensor, rank: int) -> Tensor:
        """Return the first `rank` components of a tensor of the parameter's layout, as a matrix."""
        tensor = whole(tensor)
        if tensor.shape[self.rank_axis] > rank:  # padded in static mode
            tensor = tensor.narrow(self.rank_axis, 0, rank)
        return self.to_matrix(tensor)

    def matrix(self, rank: int) -> Tensor:
        """Return the first `rank` components as a matrix that may share the parameter's memory."""
        return self.live(self.parameter, rank)

    def gradient(self, rank: int) -> Tensor:
        """Return the gradient of the first `rank` components as a matrix; zeros if missing."""
        gradient = gradient_of(self.parameter)
        if gradient is None:
            return torch.zeros_like(self.matrix(rank))
        # Sums depend on strides, and reloaded tensors are contiguous.
        return self.live(gradient, rank).contiguous()

    def padded(self, matrix: Tensor, size: int) -> Tensor:
        """Return a matrix in the parameter's layout, padded with zeros to rank `size`."""
        data = self.from_matrix(matrix)
        rank = data.shape[self.rank_axis]
        if rank == size:
            return data.contiguous()
        shape = list(data.shape)
        shape[self.rank_axis] = size
        whole = data.new_zeros(shape)
        whole.narrow(self.rank_axis, 0, rank).copy_(data)
        return whole
