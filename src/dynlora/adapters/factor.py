"""One factor of a LoRA layer: a PEFT parameter of any layout, read as one or several matrices."""

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
    """The parameter's axis of size r, times `experts`."""
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]
    rank_field: str | None = None
    """Attribute of `holder` that repeats the size of `rank_axis`; None for embeddings."""
    experts: int = 1
    """Number of matrices of rank r in the parameter, which share `rank_axis`."""
    home: torch.device | None = None
    """Device to read on, of a model split over several; None for the parameter's own."""

    @property
    def parameter(self) -> Parameter:
        """PEFT's parameter."""
        parameter: Parameter = getattr(self.holder, self.key)  # `get_parameter` parses dotted names
        return parameter

    @property
    def width(self) -> int:
        """Dimension of the matrix besides the rank."""
        shape = shape_of(self.parameter)
        return shape.numel() // shape[self.rank_axis]

    def read(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's layout as a matrix that may share its memory."""
        return self.to_matrix(whole(tensor))

    @property
    def matrix(self) -> Tensor:
        """The parameter as a matrix that may share its memory."""
        return self.read(self.parameter).to(device=self.home)

    @property
    def gradient(self) -> Tensor:
        """The gradient as a matrix; zeros if missing."""
        gradient = gradient_of(self.parameter)
        if gradient is None:
            return torch.zeros_like(self.matrix)
        # Sums depend on strides, and reloaded tensors are contiguous.
        return self.read(gradient).contiguous().to(device=self.home)
