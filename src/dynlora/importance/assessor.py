"""Stage 1. Layer importance assessor: a metric's scores, once batches agree on anything.

Agreement is asked for whenever scores are, and once shown it stays shown: near convergence steps
overshoot and gradients alternate, which says nothing against what the layers needed before.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.importance.agreement import AgreementTest
from dynlora.importance.consecutive import ConsecutiveGradients
from dynlora.importance.directions import GradientDirections
from dynlora.importance.protocol import ImportanceMetric
from dynlora.types import BasisChange, FeatureStats, LoraLayer

_Part = ImportanceMetric | ConsecutiveGradients | AgreementTest | GradientDirections


class LayerImportanceAssessor:
    """Scores the layers by one metric; says nothing while agreement could be chance."""

    def __init__(self, metric: ImportanceMetric) -> None:
        self._metric = metric
        self._gradients = ConsecutiveGradients()
        self._agreement = AgreementTest()
        self._directions = GradientDirections()
        self._proven = False

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Read gradients. Called after `backward`, before the optimizer's step."""
        self._metric.observe(layers)
        compared = self._gradients.observe(layers)
        self._directions.observe(compared)
        if not self._proven:
            self._agreement.observe(compared)

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return importance by module name, or nothing while agreement could be chance."""
        if not self._proven and self._agreement.is_significant():
            self._proven = True
        return self._metric.scores(layers, features) if self._proven else {}

    @property
    def agreement(self) -> float:
        """Agreement of batches in standard errors (see `AgreementTest`), up to its proof."""
        return self._agreement.z

    def directions(self, layers: Sequence[LoraLayer]) -> dict[str, float]:
        """Return in how many directions gradients point by module name (`GradientDirections`)."""
        return self._directions.counts(layers)

    def finish(self) -> None:
        """Free the last gradients: there will be no further comparison."""
        self._gradients = ConsecutiveGradients()

    def rebase(self, change: BasisChange) -> None:
        """Follow a change of one layer's rank."""
        self._metric.rebase(change)
        self._gradients.rebase(change)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later scores depend on, as copies."""
        tensors = {
            f"{part}/{key}": value.clone()
            for part, kept in self._parts().items()
            for key, value in kept.state_dict().items()
        }
        return {"proven": torch.tensor(self._proven)} | tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._proven = bool(state["proven"])
        for part, kept in self._parts().items():
            kept.load_state_dict(_under(f"{part}/", state))

    def _parts(self) -> dict[str, _Part]:
        return {
            "metric": self._metric,
            "gradients": self._gradients,
            "agreement": self._agreement,
            "directions": self._directions,
        }


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
