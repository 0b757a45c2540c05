"""Test whether gradients of different batches agree, which is required before ranks move.

With random labels, the cosine of consecutive gradients is positive as often as negative. Cosines
are averaged over layers and summed over steps, so that no large layer or gradient dominates.
Comparing losses is weaker, because single steps overshoot at working learning rates.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dynlora.importance.consecutive import Comparison

SIGNIFICANT = 2.5
"""Critical value of `z`: random gradients pass in 0.6 % of tests, and in at most 3 % of runs with
five events."""


class AgreementTest:
    """One-sided test for agreement of the gradients of `lora_B` in consecutive steps."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of cosines and of their squares, on the layers' device

    @torch.no_grad()
    def observe(self, compared: Comparison) -> None:
        """Add one step's mean cosine."""
        cosine = _mean_cosine(compared.inner, compared.lengths)
        terms = torch.stack([cosine, cosine.square()])
        self._sums = terms if self._sums is None else self._sums + terms

    @property
    def z(self) -> float:
        """Mean cosine in standard errors; 0 before the first comparison."""
        total, squares = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        return total / math.sqrt(squares) if squares > 0 else 0.0

    def is_significant(self) -> bool:
        """Return whether gradients agree beyond chance."""
        return self.z >= SIGNIFICANT

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of cosines and of their squares."""
        return {"sums": torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._sums = state["sums"].clone()


def _mean_cosine(products: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean cosine; a length of 0 gives a cosine of 0, and NaN is left out."""
    known = ~lengths.isnan()
    cosines = torch.where(known, products / lengths.clamp(min=1e-300), 0.0)
    return cosines.sum() / known.sum().clamp(min=1)
