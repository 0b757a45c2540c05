"""`attention_entropy`: how far the block's attention is from looking at everything alike.

Entropy is 0 where a token looks at one other alone, and the logarithm of the number of tokens that
it may see where it looks at all of them alike. There it averages its values whatever it asked for:
queries and keys decide nothing, and what training changes in them changes little. Where it is
focused, each block passes on what it has chosen, so low entropy counts as important. This looks at
what a block does with the inputs, not at what the task still needs: no claim to find needs.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynlora.distributed import process_count, sum_over_processes
from dynlora.importance.step_mean import StepMean
from dynlora.types import BasisChange, FeatureStats, LoraLayer

DECAY = 0.8
"""Weight of the past in one sampled step: a memory of about five of them."""


class AttentionEntropyMetric:
    """One minus the mean normalised entropy of a block's attention, for every layer of the block.

    What attention looks at is shown by `attend` in the forwards of sampled steps. Layers outside of
    blocks with attention are left out.
    """

    def __init__(self) -> None:
        self._shown: dict[str, Tensor] = {}
        """Sum of focus and number of rows in the forwards since the last `observe`, by module."""
        self._focus = StepMean(DECAY)

    @torch.no_grad()
    def attend(
        self,
        names: Sequence[str],
        logits: Float[Tensor, "heads queries keys"],
        visible: Bool[Tensor, "#heads queries keys"],
    ) -> None:
        """Take some tokens' attention.

        Args:
            names: Module names of the layers in the block.
            logits: What the softmax is taken of; those of keys that are not visible do not matter.
            visible: Which keys each token may look at.
        """
        total, rows = focus(logits, visible)
        added = torch.stack([total, rows])
        for name in names:
            self._shown[name] = self._shown[name] + added if name in self._shown else added

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Average what the step's forwards have shown, on all processes; no gradient is read."""
        if not self._shown:
            return
        names = sorted(self._shown)  # in the same order on all processes
        sums = torch.stack([self._shown[name] for name in names])
        if process_count() > 1:
            sums = sum_over_processes(sums)
        means = sums[:, 0] / sums[:, 1]
        self._focus.add(names, means, counts=means.isfinite())
        self._shown = {}

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return the block's focus, in ``[0, 1]``."""
        return self._focus.means(layer.name for layer in layers)

    def rebase(self, change: BasisChange) -> None:
        """Follow nothing: attention has no rank."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return running mean and weight per layer; between steps there is nothing else."""
        return self._focus.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._shown = {}
        self._focus.load_state_dict(state)


def focus(
    logits: Float[Tensor, "heads queries keys"], visible: Bool[Tensor, "#heads queries keys"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the sum over rows of ``1 - entropy / log(visible keys)``, and the number of rows.

    Rows that may look at fewer than two keys have no choice, and do not count.
    """
    keys = visible.sum(dim=-1).expand(logits.shape[:-1]).to(logits.dtype)
    rows = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    entropy = torch.special.entr(rows).sum(dim=-1) / keys.clamp(min=2).log()
    counts = keys >= 2
    found = torch.where(counts, (1 - entropy).clamp(min=0), 0.0)
    return found.double().sum(), counts.sum().double()
