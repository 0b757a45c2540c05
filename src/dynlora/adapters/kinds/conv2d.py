"""LoRA on `nn.Conv2d`: a convolution is a linear layer on the patches of its input.

`lora_A` is (r, channels * kernel height * width), `lora_B` is (out, r); tokens are patches.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dynlora.adapters.kinds.factor import Factor
from dynlora.adapters.kinds.kind import LayerKind, Rows, see_vectors
from dynlora.errors import LayerError


def _check(name: str, module: Any) -> None:
    groups = module.get_base_layer().groups
    if groups != 1:
        raise LayerError(
            f"LoRA layer {name!r} must be on an nn.Conv2d with groups=1, got groups={groups}, "
            "which ties its rank to multiples of that: leave it out of `target_modules`."
        )


def _factors(module: Any, adapter: str) -> tuple[Factor, Factor]:
    """Return the kernels of `lora_A` and `lora_B`, the latter 1 by 1."""
    first, second = module.lora_A[adapter], module.lora_B[adapter]
    to_kernel = partial(_unflat, tuple(first.weight.shape[1:]))
    return (
        Factor(first, "weight", 0, _flat, to_kernel, "out_channels"),
        Factor(second, "weight", 1, _flat, partial(_unflat, (-1, 1, 1)), "in_channels"),
    )


def _flat(kernel: Tensor) -> Tensor:
    return kernel.flatten(1)


def _unflat(shape: tuple[int, ...], matrix: Tensor) -> Tensor:
    return matrix.reshape(len(matrix), *shape)


def _rows(module: Any, adapter: str, inputs: Tensor, output: Tensor) -> Rows:
    """Return the patches that `lora_A` reads, one per output position."""
    if inputs.dim() != 4:
        return Rows(shape=(), read=_nothing)
    conv = module.lora_A[adapter]
    shape = (output.shape[0], *output.shape[2:])

    def read(index: Tensor) -> tuple[Tensor, Tensor]:
        # Windows are views of the image, so that only the requested patches are copied.
        windows = pad(inputs, conv._reversed_padding_repeated_twice)
        for axis, size, stride in zip((2, 3), conv.kernel_size, conv.stride, strict=True):
            windows = windows.unfold(axis, size, stride)
        places = torch.unravel_index(index, shape)
        patches = windows.permute(0, 2, 3, 1, 4, 5)[places].flatten(1)
        return patches, output.permute(0, 2, 3, 1)[places]

    return Rows(shape=shape, read=read)


def _nothing(index: Tensor) -> tuple[Tensor, Tensor]:
    raise IndexError(f"There is no batch to read {len(index)} patches from.")


CONV2D = LayerKind(check=_check, factors=_factors, see=see_vectors, rows=_rows)
