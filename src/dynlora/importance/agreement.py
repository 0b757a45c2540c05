"""Do batches agree on anything? The test before anything moves.

Gradients of two batches point the same way only as far as both ask for the same change. Where
labels say nothing about inputs they ask for nothing in common, and the cosine of one step's
gradient and the next one's is positive as often as negative. Cosines are averaged over layers and
added up over steps, so that neither a large layer nor a few large gradients decide.

Looking at what each step saved instead finds less: at working learning rates single steps overshoot
and seem to save nothing while training as a whole learns.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dynlora.importance.consecutive import Comparison

SIGNIFICANT = 2.5
"""Standard errors from which agreement counts: 0.6 % of pure chance passes, at most 3 % if five
events ask."""


class AgreementTest:
    """One-sided test that the gradients of `lora_B` in consecutive steps agree."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of cosines and of their squares, on the layers' device

    @torch.no_grad()
    def observe(self, compared: Comparison) -> None:
        """Add how far one step's gradients agree with the last ones."""
        cosine = _mean_cosine(compared.inner, compared.lengths)
        terms = torch.stack([cosine, cosine.square()])
        self._sums = terms if self._sums is None else self._sums + terms

    @property
    def z(self) -> float:
        """Mean cosine in standard errors; 0 before any two steps were compared."""
        total, squares = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        return total / math.sqrt(squares) if squares > 0 else 0.0

    def is_significant(self) -> bool:
        """Return whether batches agree more than by chance."""
        return self.z >= SIGNIFICANT

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums."""
        return {"sums": torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._sums = state["sums"].clone()


def _mean_cosine(products: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of the quotients; a length of 0 counts 0, and one that is NaN not at all."""
    known = ~lengths.isnan()
    cosines = torch.where(known, products / lengths.clamp(min=1e-300), 0.0)
    return cosines.sum() / known.sum().clamp(min=1)
