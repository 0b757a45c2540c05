"""The autograd function of fused LoRA layers: outputs and gradients of all that read one input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class FusedLinear(torch.autograd.Function):
    """Outputs of layers with one input: ``x W^T + b + (x (s A)^T) B^T`` for each.

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
        """Compute each layer's output, of shape ``(rows, out_features)``.

        Args:
            ctx: Autograd's context.
            inputs: Of shape ``(..., in_features)``.
            dropped: The same after dropout, which the adapters read; None without dropout.
            weights: Of each layer, ``(out_features, in_features)``; they get no gradient.
            biases: Of each layer; they get no gradient.
            scalings: Of each layer.
            factors: ``lora_A`` of each layer, then ``lora_B`` of each.
        """
        dtype, count = weights[0].dtype, len(weights)
        rows = inputs.flatten(0, -2).to(dtype)
        seen = rows if dropped is None else dropped.flatten(0, -2).to(dtype)
        ranks = [part.shape[0] for part in factors[:count]]
        lora_A = _scaled_and_joined(factors[:count], scalings).to(dtype)
        lora_B = [factor.to(dtype) for factor in factors[count:]]
        merges = dropped is None and all(pays_to_merge(weight, len(rows)) for weight in weights)
        if merges:
            kept = []
            wholes = map(torch.addmm, weights, lora_B, _split(lora_A, ranks))
            outputs = [
                linear(rows, whole, bias) for whole, bias in zip(wholes, biases, strict=True)
            ]
        else:
            kept = [lora_A @ seen.T]
            outputs = [
                linear(rows, weight, bias).addmm_(hidden.T, right.T)
                for weight, bias, hidden, right in zip(
                    weights, biases, _split(kept[0], ranks), lora_B, strict=True
                )
            ]
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
        ranks = [part.shape[0] for part in factors[:count]]
        lora_A = _scaled_and_joined(factors[:count], ctx.scalings).to(seen.dtype)
        lora_B = [factor.to(seen.dtype) for factor in factors[count:]]
        hidden = _split(kept[0] if kept else lora_A @ seen.T, ranks)
        back = _joined(
            [
                seen.new_zeros(rank, len(seen)) if g is None else right.T @ g.T
                for g, right, rank in zip(gradients, lora_B, ranks, strict=True)
            ]
        )
        to_B = [
            None if g is None else (part @ g).T for g, part in zip(gradients, hidden, strict=True)
        ]
        to_A = [
            None if g is None else part.mul_(scaling)
            for g, part, scaling in zip(
                gradients, _split(back @ seen, ranks), ctx.scalings, strict=True
            )
        ]
        to_factors = [
            None if found is None else found.to(factor.dtype)
            for found, factor in zip([*to_A, *to_B], factors, strict=True)
        ]
        to_inputs = to_dropped = None
        if ctx.needs_input_grad[0]:
            if ctx.merges:
                weights = list(map(torch.addmm, weights, lora_B, _split(lora_A, ranks)))
            to_inputs = _summed_products(gradients, weights)
            if not ctx.has_dropout and not ctx.merges:
                to_inputs.addmm_(back.T, lora_A)
            to_inputs = to_inputs.view(ctx.shape).to(ctx.dtype)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            to_dropped = (back.T @ lora_A).view(ctx.shape).to(ctx.dtype)
        return (to_inputs, to_dropped, None, None, None, *to_factors)


def _scaled_and_joined(factors: Sequence[Tensor], scalings: Sequence[float]) -> Tensor:
    """Return every `lora_A` under one another, each times its layer's scaling."""
    if len(set(scalings)) == 1:
        return _joined(factors) * scalings[0]
    return torch.cat([part * scaling for part, scaling in zip(factors, scalings, strict=True)])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _split(joined: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
    return (joined,) if len(ranks) == 1 else torch.split(joined, list(ranks))


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
