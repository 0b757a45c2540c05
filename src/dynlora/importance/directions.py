"""Gradient directions: compared gradients in, the number of output directions per layer out.

Below a head of two classes, gradients have little more than one direction, and more ranks there
learn almost nothing. Compare counts only between layers of the same batches.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.importance.averages import StepMean
from dynlora.importance.consecutive import Comparison
from dynlora.types import LoraLayer


class GradientDirections:
    """Participation ratio of the output directions of dL/dB, by module name.

    With ``G`` a step's gradient of norm 1 and ``C`` the mean of ``G Gᵀ``, of trace 1, it is
    ``1 / tr(C²)``: n for n directions of equal power. The mean of ``‖Gᵀ G'‖²`` over consecutive
    gradients estimates ``tr(C²)`` from matrices of size rank.
    """

    def __init__(self) -> None:
        self._overlaps = StepMean(decay=1)  # of ``‖Gᵀ G'‖²``

    @torch.no_grad()
    def observe(self, compared: Comparison) -> None:
        """Add the overlap of one step's gradients with the last ones."""
        known = compared.lengths > 0
        overlaps = torch.where(known, compared.overlaps / compared.lengths, 0.0).square()
        self._overlaps.add(compared.names, overlaps, counts=known)

    def counts(self, layers: Sequence[LoraLayer]) -> dict[str, float]:
        """Return the number of directions of each layer with compared gradients.

        It is clamped to ``[1, out_features]``, because alternating orthogonal gradients would give
        more.
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
