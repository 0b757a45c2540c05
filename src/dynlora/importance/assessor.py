"""Stage 1. Layer importance assessor: gradients in, a metric's scores out once gradients agree.

The agreement test ends when it is passed, because gradients alternate near convergence.
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
    """Scores layers by one metric, once gradients agree beyond chance."""

    def __init__(self, metric: ImportanceMetric) -> None:
        self._metric = metric
        self._gradients = ConsecutiveGradients()
        self._agreement = AgreementTest()
        self._directions = GradientDirections()
        self._proven = False

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Read the gradients, between `backward` and the optimizer's step."""
        self._metric.observe(layers)
        compared = self._gradients.observe(layers)
        self._directions.observe(compared)
        if not self._proven:
            self._agreement.observe(compared)

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return scores by module name; empty before gradients agree."""
        if not self._proven and self._agreement.is_significant():
            self._proven = True
        return self._metric.scores(layers, features) if self._proven else {}

    @property
    def agreement(self) -> float:
        """Agreement of gradients in standard errors (`AgreementTest`), fixed once significant."""
        return self._agreement.z

    def directions(self, layers: Sequence[LoraLayer]) -> dict[str, float]:
        """Return the number of gradient directions by module name (`GradientDirections`)."""
        return self._directions.counts(layers)

    def finish(self) -> None:
        """Free the last gradients after the last comparison."""
        self._gradients = ConsecutiveGradients()

    def rebase(self, change: BasisChange) -> None:
        """Adapt the state to a change of one layer's rank."""
        self._metric.rebase(change)
        self._gradients.rebase(change)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state that later scores depend on."""
        tensors = {
            f"{part}/{key}": value.clone()
            for part, kept in self._parts().items()
            for key, value in kept.state_dict().items()
        }
        return {"proven": torch.tensor(self._proven)} | tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
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
