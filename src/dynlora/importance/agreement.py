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
        self._sums: Tensor | None = None  # of cosines and of their squares, on the layers' device

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Compare this step's gradients with the last one's."""
        gradients = {layer.name: layer.grad_B.detach().clone() for layer in layers}
        known = [name for name in gradients if name in self._last]
        if known:
            now = [gradients[name] for name in known]
            cosine = _mean_cosine(now, [self._last[name] for name in known])
            terms = torch.stack([cosine, cosine.square()])
            self._sums = terms if self._sums is None else self._sums + terms
        self._last = gradients

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
        self._last = {}

    def rebase(self, change: BasisChange) -> None:
        """Leave a layer whose basis changed out of the next comparison."""
        self._last.pop(change.name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums and the last gradients."""
        sums = torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums
        return {"sums": sums} | {f"last/{name}": last for name, last in self._last.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._sums = state["sums"].clone()
        self._last = {
            key.removeprefix("last/"): value.clone()
            for key, value in state.items()
            if key.startswith("last/")
        }


def _mean_cosine(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the mean over pairs of tensors of their cosine; a pair with a zero tensor counts 0.

    At least in float32: products of float16 gradients vanish or overflow.
    """
    left, right = (
        [t.to(torch.promote_types(t.dtype, torch.float32)) for t in side] for side in (left, right)
    )
    products = torch.stack([p.sum() for p in torch._foreach_mul(left, right)]).double()
    lengths = [torch.stack(torch._foreach_norm(side)).double() for side in (left, right)]
    return (products / (lengths[0] * lengths[1]).clamp(min=1e-300)).mean()
