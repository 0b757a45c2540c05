"""Comparison of consecutive observed steps: gradients of `lora_B` in, inner products out.

All comparisons derive from ``Gᵀ G'``, whose size is the rank. One product serves all layers of
equal height and similar rank, padded with zeros (less than half).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora.importance.averages import are_known_finite
from dynlora.types import BasisChange, LoraLayer


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One step's gradients ``G`` against the last finite ones ``G'``, per layer, in float64."""

    names: list[str]
    inner: Float[Tensor, " layers"]
    """Inner product of ``G`` and ``G'``."""
    overlaps: Float[Tensor, " layers"]
    """Norm of ``Gᵀ G'`` over `lengths`, the overlap of their output directions; of a stack, the
    root mean square over its experts, weighted by the squares of their lengths."""
    lengths: Float[Tensor, " layers"]
    """Product of the norms; NaN if a gradient is missing or not finite, which also makes the other
    values meaningless."""


_Stacks = dict[tuple[tuple[str, ...], torch.dtype], tuple[Tensor, Tensor]]


class ConsecutiveGradients:
    """Keeps each layer's last finite gradient, and compares the next one with it."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}  # NaN if none was finite yet
        self._stacks: _Stacks = {}
        """Kept gradients of the last step, of which `_last` has views, and the gradients that they
        were compared with, by layers and dtype of a group. The next step overwrites the latter,
        because allocating memory costs more than the comparison."""

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> Comparison:
        """Compare this step's gradients with the last finite ones, and keep the finite ones."""
        alike: defaultdict[tuple[Any, ...], list[LoraLayer]] = defaultdict(list)
        for layer in layers:
            *heights, rank = layer.grad_B.shape
            alike[*heights, (rank - 1).bit_length(), layer.grad_B.dtype].append(layer)
        before, self._stacks = self._stacks, {}
        figures = torch.cat([self._compare(group, before) for group in alike.values()], dim=1)
        inner, overlaps, lengths = figures.unbind()
        names = [layer.name for group in alike.values() for layer in group]
        return Comparison(names=names, inner=inner, overlaps=overlaps, lengths=lengths)

    def _compare(self, layers: Sequence[LoraLayer], before: _Stacks) -> Float[Tensor, "3 layers"]:
        """Return inner products, overlaps and lengths for layers of equal height, similar rank."""
        names = tuple(layer.name for layer in layers)
        finite = torch.stack([layer.finite for layer in layers])
        gradients = [layer.grad_B for layer in layers]
        # At least float32: products of float16 gradients vanish or overflow.
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        last, unused = before.get((names, dtype), (None, None))
        if last is None:
            last = _stacked(list(map(self._last_of, layers)), dtype)
        now = _stacked(gradients, dtype, into=unused)
        kept = now
        if not are_known_finite(finite):
            kept = torch.where(finite.view(-1, *[1] * (now.dim() - 1)), now, last)
        self._stacks[names, dtype] = kept, last
        self._last.update(zip(names, map(_of_rank, kept, gradients), strict=True))
        products = now.mT @ last
        inner = products.diagonal(dim1=-2, dim2=-1).flatten(1).sum(dim=1).double()
        norms, last_norms, overlaps = (
            torch.linalg.matrix_norm(part).double().view(len(now), -1)  # per expert
            for part in (now, last, products)
        )
        lengths = torch.where(finite, norms.norm(dim=1) * last_norms.norm(dim=1), torch.nan)
        return torch.stack(
            [inner, overlaps.norm(dim=1) / (norms * last_norms).norm(dim=1), lengths]
        )

    def _last_of(self, layer: LoraLayer) -> Float[Tensor, "*experts out r"]:
        last = self._last.get(layer.name)
        return torch.full_like(layer.grad_B, torch.nan) if last is None else last

    def rebase(self, change: BasisChange) -> None:
        """Leave the resized layer out of the next comparison."""
        self._last.pop(change.name, None)
        self._stacks.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the last finite gradient by module name; later steps overwrite the memory."""
        return {name: last for name, last in self._last.items() if not last.isnan().any()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._last = {name: value.clone() for name, value in state.items()}
        self._stacks = {}


def _of_rank(row: Float[Tensor, "*out _"], gradient: Float[Tensor, "*out r"]) -> Tensor:
    """Return a layer's slice of a stack without its padding."""
    rank = gradient.shape[-1]
    return row if row.shape[-1] == rank else row[..., :rank]


def _stacked(
    gradients: list[Float[Tensor, "*out _"]], dtype: torch.dtype, into: Tensor | None = None
) -> Float[Tensor, "layers *out rank"]:
    """Return gradients of equal height, padded to their highest rank; overwrite `into` if given."""
    if into is None:
        *experts, height, _ = gradients[0].shape
        highest = max(gradient.shape[-1] for gradient in gradients)
        into = gradients[0].new_zeros(len(gradients), *experts, highest, height, dtype=dtype).mT
    torch._foreach_copy_(list(map(_of_rank, into, gradients)), gradients)
    return into
