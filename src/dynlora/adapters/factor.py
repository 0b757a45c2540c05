"""One of the two factors of a LoRA layer: a PEFT parameter of any layout, read as a matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


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
    def matrix(self) -> Tensor:
        """The parameter as a matrix; shares its memory."""
        return self.to_matrix(self.parameter)

    @property
    def gradient(self) -> Tensor:
        """The parameter's gradient as a matrix; zeros where no backward pass left one."""
        gradient = self.parameter.grad
        if gradient is None:
            return torch.zeros_like(self.matrix)
        # Sums over a tensor depend on its strides, and a reloaded one is contiguous.
        return self.to_matrix(gradient).contiguous()


def same(tensor: Tensor) -> Tensor:
    """Return the tensor: the parameter is the matrix."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """Return the transpose of a matrix."""
    return tensor.T
