"""Output of a fused LoRA layer, and the autograd function of its merged form."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def lora_linear(
    inputs: Tensor,
    dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scaling: float,
    lora_A: Tensor,
    lora_B: Tensor,
) -> Tensor:
    """Return the output of one LoRA layer, ``x W^T + b + (x (s A)^T) B^T``.

    Args:
        inputs: Of shape ``(..., in_features)``.
        dropped: `inputs` after dropout, which the adapter reads; None without dropout.
        weight: Frozen, ``(out_features, in_features)``, in the dtype to compute in.
        bias: Frozen, ``(out_features,)``, in the same dtype.
        scaling: Factor on the adapter's output.
        lora_A: ``(r, in_features)``.
        lora_B: ``(out_features, r)``.

    Returns:
        The output, of shape ``(..., out_features)``.
    """
    rows = inputs.flatten(0, -2).to(weight.dtype)
    left, right = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    if dropped is None and pays_to_merge(weight, len(rows)):
        output = _Merged.apply(rows, weight, bias, scaling, left, right)  # type: ignore[no-untyped-call]
    else:
        seen = rows if dropped is None else dropped.flatten(0, -2).to(weight.dtype)
        output = linear(rows, weight, bias).addmm_(linear(seen, left) * scaling, right.T)
    return cast(Tensor, output.view(*inputs.shape[:-1], len(weight)))


class _Merged(torch.autograd.Function):
    """``x (W + s B A)^T + b``, with gradients of ``x``, ``A`` and ``B``."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: float,
        left: Tensor,
        right: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, left, right)
        ctx.scaling = scaling
        return linear(rows, torch.addmm(weight, right, left, alpha=scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, left, right = ctx.saved_tensors
        to_left = ((gradient @ right).T @ rows).mul_(ctx.scaling)
        # Computed transposed, which is up to three times as fast on CPUs, and scaled into the
        # layout of `right`, into which autograd would copy it.
        to_right = torch.empty_like(right)
        torch.mul(((rows @ left.T).T @ gradient).T, ctx.scaling, out=to_right)
        to_rows = None
        if ctx.needs_input_grad[0]:
            to_rows = gradient @ torch.addmm(weight, right, left, alpha=ctx.scaling)
        return to_rows, None, None, None, to_left, to_right


def pays_to_merge(weight: Tensor, rows: int) -> bool:
    """Return whether one product with ``W + s B A`` is faster than separate products.

    Computing the sum costs two passes over a weight, in forward and backward, and saves one over
    input and output. Below float32 it would round the adapter away. Measured on CPUs only.
    """
    able = weight.device.type == "cpu" and weight.dtype.itemsize >= 4
    return able and rows * sum(weight.shape) > 2 * weight.numel()
