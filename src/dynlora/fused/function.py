"""Autograd function of a fused LoRA layer: output and gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class FusedLinear(torch.autograd.Function):
    """Output of one LoRA layer: ``x W^T + b + (x (s A)^T) B^T``.

    In products with one side as short as the rank, the long side comes last, because CPU libraries
    compute these faster than their transposes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        scaling: float,
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> Tensor:
        """Compute the output, of shape ``(rows, out_features)``.

        Args:
            ctx: Autograd's context.
            inputs: Of shape ``(..., in_features)``.
            dropped: `inputs` after dropout, which the adapter reads; None without dropout.
            weight: Frozen, ``(out_features, in_features)``, in the dtype to compute in.
            bias: Frozen, ``(out_features,)``, in the same dtype.
            scaling: Factor on the adapter's output.
            lora_A: ``(r, in_features)``.
            lora_B: ``(out_features, r)``.
        """
        rows = inputs.flatten(0, -2).to(weight.dtype)
        seen = rows if dropped is None else dropped.flatten(0, -2).to(weight.dtype)
        scaled_A, right = (lora_A * scaling).to(weight.dtype), lora_B.to(weight.dtype)
        merges = dropped is None and pays_to_merge(weight, len(rows))
        if merges:
            hidden = None
            output = linear(rows, torch.addmm(weight, right, scaled_A), bias)
        else:
            hidden = scaled_A @ seen.T
            output = linear(rows, weight, bias).addmm_(hidden.T, right.T)
        ctx.save_for_backward(seen, weight, lora_A, lora_B, hidden)
        ctx.scaling, ctx.merges, ctx.has_dropout = scaling, merges, dropped is not None
        ctx.shape, ctx.dtype = inputs.shape, inputs.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Compute the gradients of the input and of both factors."""
        seen, weight, lora_A, lora_B, hidden = ctx.saved_tensors
        scaled_A, right = (lora_A * ctx.scaling).to(seen.dtype), lora_B.to(seen.dtype)
        back = right.T @ gradient.T
        to_A = (back @ seen).mul_(ctx.scaling).to(lora_A.dtype)
        to_B = (scaled_A @ seen.T if hidden is None else hidden) @ gradient
        # In the layout of `lora_B`, into which autograd would copy it, except at rank 1.
        to_B = to_B.T.to(lora_B.dtype, copy=True, memory_format=torch.contiguous_format)
        to_inputs = to_dropped = None
        if ctx.needs_input_grad[0]:
            if ctx.merges:
                to_inputs = gradient @ torch.addmm(weight, right, scaled_A)
            else:
                to_inputs = gradient @ weight
                if not ctx.has_dropout:
                    to_inputs.addmm_(back.T, scaled_A)
            to_inputs = to_inputs.view(ctx.shape).to(ctx.dtype)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            to_dropped = (back.T @ scaled_A).view(ctx.shape).to(ctx.dtype)
        return to_inputs, to_dropped, None, None, None, to_A, to_B


def pays_to_merge(weight: Tensor, rows: int) -> bool:
    """Return whether one product with ``W + s B A`` is faster than separate products.

    Computing the sum costs two passes over a weight, in forward and backward, and saves one over
    input and output. Below float32 it would round the adapter away. Measured on CPUs only.
    """
    able = weight.device.type == "cpu" and weight.dtype.itemsize >= 4
    return able and rows * sum(weight.shape) > 2 * weight.numel()
