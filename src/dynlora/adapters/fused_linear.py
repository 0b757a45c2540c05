"""The autograd function of fused LoRA layers: outputs and gradients of all that read one input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class FusedLinear(torch.autograd.Function):
    """Outputs of layers with one input: ``x W^T + b + s (x A^T) B^T`` for each.

    Products with a side as short as the rank are written so that the long side is the last: faster
    than their transposes in the libraries that torch calls on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        dropped: Tensor | None,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        scalings: Sequence[float],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute each layer's output.

        Args:
            ctx: Autograd's context.
            inputs: Of shape ``(..., in_features)``.
            dropped: The same after dropout, which the adapters read; None without dropout.
            weights: Of each layer, ``(out_features, in_features)``; they get no gradient.
            biases: Of each layer; they get no gradient.
            scalings: Of each layer.
            factors: ``lora_A`` of each layer, then ``lora_B`` of each.
        """
        dtype = weights[0].dtype
        rows = inputs.flatten(0, -2).to(dtype)
        seen = rows if dropped is None else dropped.flatten(0, -2).to(dtype)
        ranks, lora_A, lora_B = _joined(factors, scalings, dtype)
        merges = dropped is None and all(pays_to_merge(weight, len(rows)) for weight in weights)
        kept = [] if merges else [lora_A @ seen.T]
        outputs = []
        for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if merges:
                whole = torch.addmm(weight, lora_B[place], torch.split(lora_A, ranks)[place])
                output = linear(rows, whole, bias)
            else:
                hidden = torch.split(kept[0], ranks)[place]
                output = linear(rows, weight, bias).addmm_(hidden.T, lora_B[place].T)
            outputs.append(output.view(*inputs.shape[:-1], output.shape[-1]))
        ctx.save_for_backward(seen, *weights, *factors, *kept)
        ctx.scalings, ctx.merges = scalings, merges
        ctx.shape, ctx.dtype = inputs.shape, inputs.dtype
        ctx.has_dropout = dropped is not None
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Compute the gradients of the input and of both factors of each layer."""
        count = len(ctx.scalings)
        if all(g is None for g in gradients):
            return (None,) * (5 + 2 * count)
        seen, *others = ctx.saved_tensors
        weights, factors, kept = others[:count], others[count : 3 * count], others[3 * count :]
        ranks, lora_A, lora_B = _joined(factors, ctx.scalings, seen.dtype)
        hidden = torch.split(kept[0] if kept else lora_A @ seen.T, ranks)
        arrived = [None if g is None else g.flatten(0, -2) for g in gradients]
        back = torch.cat(
            [
                seen.new_zeros(rank, len(seen)) if g is None else right.T @ g.T
                for g, right, rank in zip(arrived, lora_B, ranks, strict=True)
            ]
        )
        to_B = [
            None if g is None else (part @ g).T * scaling
            for g, part, scaling in zip(arrived, hidden, ctx.scalings, strict=True)
        ]
        to_A = [
            None if g is None else part
            for g, part in zip(arrived, torch.split(back @ seen, ranks), strict=True)
        ]
        to_factors = [
            None if found is None else found.to(factor.dtype)
            for found, factor in zip([*to_A, *to_B], factors, strict=True)
        ]
        to_inputs = to_dropped = None
        if ctx.needs_input_grad[0]:
            if ctx.merges:
                parts = torch.split(lora_A, ranks)
                weights = [torch.addmm(*each) for each in zip(weights, lora_B, parts, strict=True)]
            to_inputs = _summed_products(arrived, weights)
            if not ctx.has_dropout and not ctx.merges:
                to_inputs.addmm_(back.T, lora_A)
            to_inputs = to_inputs.view(ctx.shape).to(ctx.dtype)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            to_dropped = (back.T @ lora_A).view(ctx.shape).to(ctx.dtype)
        return (to_inputs, to_dropped, None, None, None, *to_factors)


def _joined(
    factors: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype
) -> tuple[list[int], Tensor, list[Tensor]]:
    """Return each layer's rank, every `lora_A` under one another, and every scaled `lora_B`."""
    count = len(scalings)
    scaled = [
        (factor * scaling).to(dtype)
        for factor, scaling in zip(factors[count:], scalings, strict=True)
    ]
    return (
        [part.shape[0] for part in factors[:count]],
        torch.cat(list(factors[:count])).to(dtype),
        scaled,
    )


def _summed_products(gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``g W`` over the layers that a gradient has reached: at least one."""
    pairs = [(g, weight) for g, weight in zip(gradients, weights, strict=True) if g is not None]
    total: Tensor = pairs[0][0] @ pairs[0][1]
    for g, weight in pairs[1:]:
        total.addmm_(g, weight)
    return total


def pays_to_merge(weight: Tensor, rows: int) -> bool:
    """Return whether one product with ``W + s B A``, made for it, beats one with each.

    It takes two passes over a weight, in forward and backward, and saves one over input and output.
    In less than float32 it would round away what the adapter adds. Measured on CPUs alone.
    """
    able = weight.device.type == "cpu" and weight.dtype.itemsize >= 4
    return able and rows * sum(weight.shape) > 2 * weight.numel()
