"""Do batches agree on anything? The test before anything moves.

Gradients of two batches point the same way only as far as both ask for the same change. Where
labels say nothing about inputs they ask for nothing in common, and the cosine of one step's
gradient and the next one's is positive as often as negative. Cosines are averaged over layers and
added up over steps, so that neither a large layer nor a few large gradients decide.

Looking at what each step saved instead finds less: at working learning rates single steps overshoot
and seem to save nothing while training as a whole learns.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, LoraLayer

SIGNIFICANT = 2.5
"""Standard errors from which agreement counts: 0.6 % of pure chance passes, at most 3 % if five
events ask."""


class AgreementTest:
    """One-sided test that the gradients of `lora_B` in consecutive steps agree."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}  # of the last gradients; NaN if none was finite yet
        self._sums: Tensor | None = None  # of cosines and of their squares, on the layers' device

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Compare this step's gradients with the last ones; those not finite are left out."""
        names = [layer.name for layer in layers]
        finite = [layer.finite for layer in layers]
        gradients = _wide([layer.grad_B.detach() for layer in layers])
        # A layer without a last gradient is compared with nothing, because the norm is NaN.
        unknown = gradients[0].new_full((), torch.nan, dtype=torch.float64)
        last = list(map(self._last.get, names, gradients))
        last_norms = torch.stack([self._norms.get(name, unknown) for name in names])
        norms = torch.where(torch.stack(finite), _norms(gradients), unknown)
        cosine = _mean_cosine(_products(gradients, last), norms * last_norms)
        terms = torch.stack([cosine, cosine.square()])
        self._sums = terms if self._sums is None else self._sums + terms
        kept_norms = torch.where(norms.isnan(), last_norms, norms)
        self._last = dict(zip(names, map(torch.where, finite, gradients, last), strict=True))
        self._norms = dict(zip(names, kept_norms.unbind(), strict=True))

    @property
    def z(self) -> float:
        """Mean cosine in standard errors; 0 before any two steps were compared."""
        total, squares = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        return total / math.sqrt(squares) if squares > 0 else 0.0

    def is_significant(self) -> bool:
        """Return whether batches agree more than by chance."""
        return self.z >= SIGNIFICANT

    def finish(self) -> None:
        """Free the last gradients: there will be no further comparison."""
        self._last, self._norms = {}, {}

    def rebase(self, change: BasisChange) -> None:
        """Leave a layer whose basis changed out of the next comparison."""
        self._last.pop(change.name, None)
        self._norms.pop(change.name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums and the last gradients that were finite."""
        sums = torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums
        known = [name for name, norm in self._norms.items() if not norm.isnan()]
        return {"sums": sums} | {f"last/{name}": self._last[name] for name in known}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._sums = state["sums"].clone()
        self._last = {
            key.removeprefix("last/"): value.clone()
            for key, value in state.items()
            if key.startswith("last/")
        }
        norms = _norms(list(self._last.values())) if self._last else ()
        self._norms = dict(zip(self._last, norms, strict=True))


def _mean_cosine(products: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of the quotients; a length of 0 counts 0, and one that is NaN not at all."""
    known = ~lengths.isnan()
    cosines = torch.where(known, products / lengths.clamp(min=1e-300), 0.0)
    return cosines.sum() / known.sum().clamp(min=1)


def _products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the inner product of each pair of tensors."""
    products = torch._foreach_mul(left, right)
    return torch.stack([product.sum() for product in products]).double()


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return the norm of each tensor."""
    return torch.stack(torch._foreach_norm(tensors)).double()


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors of at least float32: products of float16 gradients vanish or overflow."""
    if all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors):
        return tensors  # calls that change nothing would be most of the time on small layers
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
