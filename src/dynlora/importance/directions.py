"""In how many directions of its output do a layer's gradients point?

The layer below a head of two classes is asked for little more than one direction, however much it
matters, and further ranks there find next to nothing to learn. The count is a hint of that: what
matters is how it compares between layers that see the same batches.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.importance.consecutive import Comparison
from dynlora.importance.step_mean import StepMean
from dynlora.types import LoraLayer


class GradientDirections:
    """Participation ratio of the directions of dL/dB on the output's side, by module name.

    With ``G`` a step's gradient of norm 1 and ``C`` the mean of ``G Gᵀ``, of trace 1, it is
    ``1 / tr(C²)``: n for n directions of equal power. For gradients of two batches the mean of
    ``‖Gᵀ G'‖²`` is ``tr(C²)``, so that consecutive ones are enough, and what is needed has the size
    of ranks.
    """

    def __init__(self) -> None:
        self._overlaps = StepMean(decay=1)  # of ``‖Gᵀ G'‖²``

    @torch.no_grad()
    def observe(self, compared: Comparison) -> None:
        """Add what one step's gradients have in common with the last ones."""
        known = compared.lengths > 0
        overlaps = torch.where(known, compared.overlaps / compared.lengths, 0.0).square()
        self._overlaps.add(compared.names, overlaps, counts=known)

    def counts(self, layers: Sequence[LoraLayer]) -> dict[str, float]:
        """Return the number of directions of each layer of which two gradients were compared.

        At least 1 and at most the output's dimensions: gradients of batches that take turns, with
        nothing in common, would seem to have more.
        """
        means = self._overlaps.means(layer.name for layer in layers)
        widths = {layer.name: layer.out_features for layer in layers}
        return {name: 1 / min(max(mean, 1 / widths[name]), 1.0) for name, mean in means.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums by module name."""
        return self._overlaps.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._overlaps.load_state_dict(state)
