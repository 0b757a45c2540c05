"""Stage 1. Layer importance assessor: a metric's scores, once training has made progress."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dynlora.importance.progress import ProgressTest
from dynlora.importance.protocol import ImportanceMetric
from dynlora.types import BasisChange, FeatureStats, LoraLayer


class LayerImportanceAssessor:
    """Scores the layers by one metric; says nothing while progress could be chance."""

    def __init__(self, metric: ImportanceMetric) -> None:
        self._metric = metric
        self._progress = ProgressTest()

    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Read gradients and weights. Called after `backward`, before the optimizer's step."""
        self._metric.observe(layers)
        self._progress.observe(layers)

    def scores(
        self, layers: Sequence[LoraLayer], features: Mapping[str, FeatureStats]
    ) -> dict[str, float]:
        """Return importance by module name, or nothing while progress could be chance."""
        return self._metric.scores(layers, features) if self._progress.is_significant() else {}

    @property
    def progress(self) -> float:
        """Progress of training in standard errors (see `ProgressTest`)."""
        return self._progress.z

    def rebase(self, change: BasisChange) -> None:
        """Follow a change of one layer's rank."""
        self._metric.rebase(change)
        self._progress.rebase(change)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later scores depend on."""
        metric = {f"metric/{key}": value for key, value in self._metric.state_dict().items()}
        progress = {f"progress/{key}": value for key, value in self._progress.state_dict().items()}
        return metric | progress

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._metric.load_state_dict(_under("metric/", state))
        self._progress.load_state_dict(_under("progress/", state))


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
