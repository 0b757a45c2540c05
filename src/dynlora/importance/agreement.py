"""Statistics of compared gradients: agreement of batches, and number of directions per layer.

With random labels, the cosine of consecutive gradients is positive as often as negative. It is
averaged over layers and summed over steps, so that no large layer or gradient dominates. Comparing
losses is weaker, because single steps overshoot at working learning rates.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.history import SIGNIFICANT
from dynlora.importance.averages import StepMean
from dynlora.importance.consecutive import Comparison
from dynlora.types import LoraLayer


class AgreementTest:
    """One-sided test for agreement of the gradients of `lora_B` in consecutive steps."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of cosines and of their squares, on the layers' device

    @torch.no_grad()
    def observe(self, compared: Comparison) -> None:
        """Add one step's mean cosine; a length of 0 counts as a cosine of 0, NaN does not count."""
        known = ~compared.lengths.isnan()
        cosines = torch.where(known, compared.inner / compared.lengths.clamp(min=1e-300), 0.0)
        cosine = cosines.sum() / known.sum().clamp(min=1)
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


class GradientDirections:
    """Participation ratio of the output directions of dL/dB, by module name.

    With ``G`` a step's gradient of norm 1 and ``C`` the mean of ``G Gᵀ``, of trace 1, it is
    ``1 / tr(C²)``: n for n directions of equal power. The mean of ``‖Gᵀ G'‖²`` over consecutive
    gradients estimates ``tr(C²)`` from matrices of size rank.

    Below a head of two classes, gradients have little more than one direction, and more ranks there
    learn almost nothing. Compare counts only between layers of the same batches.
    """

    def __init__(self) -> None:
        self._overlaps = StepMean(decay=1)  # of ``‖Gᵀ G'‖²``

    @torch.no_grad()
    def observe(self, compared: Comparison) -> None:
        """Add the overlap of one step's gradients with the last ones."""
        known = compared.lengths > 0
        overlaps = torch.where(known, compared.overlaps, 0.0).square()
        self._overlaps.add(compared.names, overlaps, counts=known)

    def counts(self, layers: Sequence[LoraLayer]) -> dict[str, float]:
        """Return each layer's number of directions, clamped to ``[1, out_features]``.

        Alternating orthogonal gradients would give more.
        """
        means = self._overlaps.means(layer.name for layer in layers)
        widths = {layer.name: layer.out_features for layer in layers}
        return {name: 1 / min(max(mean, 1 / widths[name]), 1.0) for name, mean in means.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return sum and number of comparisons per layer."""
        return self._overlaps.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._overlaps.load_state_dict(state)
