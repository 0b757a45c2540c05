"""Gradients of `lora_B` in one observed step compared with those of the step before.

What tells two steps apart needs no more than ``Gᵀ G'``, which has the size of ranks. Layers of one
height and like ranks are compared in one product, lower ranks filled up with zeros, which change
nothing: calls, not numbers, are what small layers cost. Of what is stacked less than half is zeros.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynlora.types import BasisChange, LoraLayer


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One step's gradients ``G`` beside the last finite ones ``G'``, layer by layer, in float64."""

    names: list[str]
    inner: Float[Tensor, " layers"]
    """Inner product of both."""
    overlaps: Float[Tensor, " layers"]
    """Norm of ``Gᵀ G'``: of what they have in common on the output's side."""
    lengths: Float[Tensor, " layers"]
    """Product of both norms; NaN where there is nothing to compare, and the others mean nothing."""


class ConsecutiveGradients:
    """Keeps each layer's last gradient that was finite, for the next step to be compared with."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}  # NaN if none was finite yet

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> Comparison:
        """Compare this step's gradients with the last ones, and keep those that are finite."""
        alike: defaultdict[tuple[int, int, torch.dtype], list[LoraLayer]] = defaultdict(list)
        for layer in layers:
            height, rank = layer.grad_B.shape
            alike[height, (rank - 1).bit_length(), layer.grad_B.dtype].append(layer)
        figures = torch.cat([self._compare(group) for group in alike.values()], dim=1)
        inner, overlaps, lengths = figures.unbind()
        names = [layer.name for group in alike.values() for layer in group]
        return Comparison(names=names, inner=inner, overlaps=overlaps, lengths=lengths)

    def _compare(self, layers: Sequence[LoraLayer]) -> Float[Tensor, "3 layers"]:
        """Return inner products, overlaps and lengths of layers of one height and like ranks."""
        names = [layer.name for layer in layers]
        finite = torch.stack([layer.finite for layer in layers])
        given = _stacked([layer.grad_B for layer in layers])
        # Products of float16 gradients vanish or overflow.
        now = given.to(torch.promote_types(given.dtype, torch.float32))
        unknown = now.new_full((), torch.nan)
        last = _stacked(
            [
                self._last[name] if name in self._last else unknown.expand(layer.grad_B.shape)
                for name, layer in zip(names, layers, strict=True)
            ]
        )
        kept = torch.where(finite[:, None, None], now, last).unbind()
        self._last.update(zip(names, map(_of_rank, kept, layers), strict=True))
        products = now.mT @ last
        norms = torch.where(finite, torch.linalg.matrix_norm(now).double(), torch.nan)
        return torch.stack(
            [
                products.diagonal(dim1=1, dim2=2).sum(dim=1).double(),
                torch.linalg.matrix_norm(products).double(),
                norms * torch.linalg.matrix_norm(last),
            ]
        )

    def rebase(self, change: BasisChange) -> None:
        """Leave a layer whose basis changed out of the next comparison."""
        self._last.pop(change.name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return by module name the last gradients that were finite."""
        return {name: last for name, last in self._last.items() if not last.isnan().any()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._last = {name: value.clone() for name, value in state.items()}


def _of_rank(gradient: Float[Tensor, "out _"], layer: LoraLayer) -> Float[Tensor, "out r"]:
    """Return a gradient without what fills it up."""
    rank = layer.grad_B.shape[1]
    return gradient if gradient.shape[1] == rank else gradient[:, :rank]


def _stacked(gradients: Sequence[Float[Tensor, "out _"]]) -> Float[Tensor, "layers out rank"]:
    """Return gradients as one tensor of the highest of their ranks."""
    if len({gradient.shape for gradient in gradients}) == 1:
        return torch.stack(list(gradients))
    return pad_sequence([gradient.mT for gradient in gradients], batch_first=True).mT
