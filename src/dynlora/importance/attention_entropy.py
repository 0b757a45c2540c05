"""`attention_entropy`: attention logits in, one minus their normalized entropy per layer out.

Queries and keys have little effect on uniform attention, so low entropy counts as important. The
score describes a block's attention, not the needs of the task.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynlora.distributed import process_count, sum_over_processes
from dynlora.importance.averages import StepMean
from dynlora.types import BasisChange, FeatureStats, LoraLayer

DECAY = 0.8
"""Weight of the past in one sampled step: a memory of about five of them."""


class AttentionEntropyMetric:
    """One minus the mean normalized entropy of a block's attention, for every layer of the block.

    It is an extension, to receive logits in sampled steps. Layers outside attention have no score.
    """

    def __init__(self) -> None:
        self._taps: Any = None
        self._shown: dict[str, Tensor] = {}
        """Sum of focus and number of rows since the last `observe`, by module name."""
        self._focus = StepMean(DECAY)

    def attach(self, host: Any) -> None:
        """Find the attention of each block (see `adapters.extension`)."""
        if self._taps is None:
            self._taps = host.attention_taps(self)

    def begin_step(self, step: int, *, sampled: bool) -> None:
        """Receive attention in sampled steps only."""
        if sampled:
            self._taps.open()
        else:
            self._taps.close()

    def after_event(self, order: Callable[[], None]) -> None:
        """Do nothing: attention does not depend on ranks."""

    def freeze(self) -> None:
        """Receive no more attention."""
        self._taps.close()

    def close(self) -> None:
        """Remove every hook."""
        self._taps.close()

    @torch.no_grad()
    def attend(
        self,
        names: Sequence[str],
        logits: Float[Tensor, "heads queries keys"],
        visible: Bool[Tensor, "#heads queries keys"],
    ) -> None:
        """Add the attention of some tokens, from logits before the softmax."""
        total, rows = focus(logits, visible)
        added = torch.stack([total, rows])
        for name in names:
            self._shown[name] = self._shown[name] + added if name in self._shown else added

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Average the attention of the step's forwards over all processes; read no gradient."""
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
        """Return the running mean of the block's focus, in ``[0, 1]``."""
        return self._focus.means(layer.name for layer in layers)

    def rebase(self, change: BasisChange) -> None:
        """Do nothing: attention does not depend on the basis."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return weighted sum and weight per layer; complete only between steps."""
        return self._focus.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._shown = {}
        self._focus.load_state_dict(state)


def focus(
    logits: Float[Tensor, "heads queries keys"], visible: Bool[Tensor, "#heads queries keys"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the sum over rows of ``1 - entropy / log(visible keys)``, and the number of rows.

    Rows with fewer than two visible keys do not count.
    """
    keys = visible.sum(dim=-1).expand(logits.shape[:-1]).to(logits.dtype)
    rows = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    entropy = torch.special.entr(rows).sum(dim=-1) / keys.clamp(min=2).log()
    counts = keys >= 2
    found = torch.where(counts, (1 - entropy).clamp(min=0), 0.0)
    return found.double().sum(), counts.sum().double()
