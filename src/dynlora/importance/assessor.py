"""Stage 1. Layer importance assessor: a metric's scores, once batches agree on anything.

Agreement is asked for whenever scores are, and once shown it stays shown: near convergence steps
overshoot and gradients alternate, which says nothing against what the layers needed before.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.importance.agreement import AgreementTest
from dynlora.importance.protocol import ImportanceMetric
from dynlora.types import BasisChange, FeatureStats, LoraLayer


class LayerImportanceAssessor:
    """Scores the layers by one metric; says nothing while agreement could be chance."""

    def __init__(self, metric: ImportanceMetric) -> None:
        self._metric = metric
        self._agreement = AgreementTest()
        self._proven = False

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Read gradients. Called after `backward`, before the optimizer's step."""
        self._metric.observe(layers)
        if not self._proven:
            self._agreement.observe(layers)

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return importance by module name, or nothing while agreement could be chance."""
        if not self._proven and self._agreement.is_significant():
            self._proven = True
            self._agreement.finish()
        return self._metric.scores(layers, features) if self._proven else {}

    @property
    def agreement(self) -> float:
        """Agreement of batches in standard errors (see `AgreementTest`), up to its proof."""
        return self._agreement.z

    def rebase(self, change: BasisChange) -> None:
        """Follow a change of one layer's rank."""
        self._metric.rebase(change)
        self._agreement.rebase(change)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later scores depend on, as copies."""
        metric = {f"metric/{key}": value for key, value in self._metric.state_dict().items()}
        agreement = {
            f"agreement/{key}": value for key, value in self._agreement.state_dict().items()
        }
        tensors = {key: value.clone() for key, value in (metric | agreement).items()}
        return {"proven": torch.tensor(self._proven)} | tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._proven = bool(state["proven"])
        self._metric.load_state_dict(_under("metric/", state))
        self._agreement.load_state_dict(_under("agreement/", state))


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
