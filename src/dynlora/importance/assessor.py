"""Stage 1. Layer importance assessor: gradients in, scores equal on all processes out.

No layer has a score before gradients agree beyond chance. The test ends when it is passed, because
gradients alternate near convergence.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dynlora.distributed import agreed_figures, max_over_processes, names_on_all, process_count
from dynlora.errors import ConfigError, EngineError, check_finite
from dynlora.importance import ImportanceMetric
from dynlora.importance.agreement import AgreementTest, GradientDirections
from dynlora.importance.consecutive import ConsecutiveGradients
from dynlora.types import Assessment, BasisChange, FeatureStats, LoraLayer

_Part = ImportanceMetric | ConsecutiveGradients | AgreementTest | GradientDirections


class LayerImportanceAssessor:
    """Scores layers by one metric, and counts the gradients and scores that are not finite."""

    def __init__(
        self,
        metric: ImportanceMetric,
        layers: Sequence[LoraLayer],
        *,
        device: torch.device,
        stops: bool = False,
    ) -> None:
        """Start without gradients; `layers` must have the same order on every process."""
        self._metric = metric
        self._layers = layers
        self._device = device
        self._names = [layer.name for layer in layers]
        self._stops = stops
        self._gradients = ConsecutiveGradients()
        self._agreement = AgreementTest()
        self._directions = GradientDirections()
        self._proven = False
        self._reduced = False  # whether gradients were checked to be equal on all processes
        self._unreached = set(self._names)
        self._skipped: Counter[str] = Counter()
        self._unread: Tensor | None = None  # counts of non-finite gradients, on their device

    def observe(self, layers: Sequence[LoraLayer], *, step: int) -> None:
        """Read the gradients, between `backward` and the optimizer's step `step`, from 1."""
        finite = {layer.name: layer.finite for layer in layers}
        self._unreached.difference_update(finite)
        if self._stops:
            flags = torch.stack(list(finite.values())).tolist()
            broken = [name for name, kept in zip(finite, flags, strict=True) if not kept]
            check_finite(broken, "gradient", step=step, layers=len(self._layers))
        self._count_broken(finite)
        if process_count() > 1 and not self._reduced and all(finite.values()):
            _check_reduced(self._layers)
            self._reduced = True
        self._metric.observe(layers)
        compared = self._gradients.observe(layers)
        self._directions.observe(compared)
        if not self._proven:
            self._agreement.observe(compared)

    def assess(self, features: Mapping[str, FeatureStats], *, step: int) -> Assessment:
        """Return scores, gradient directions and unreached layers; no scores before agreement."""
        self._proven = self._proven or self._agreement.is_significant()
        scores = self._metric.scores(self._layers, features) if self._proven else {}
        for name, score in scores.items():
            if name not in self._names or score < 0:
                raise ConfigError(
                    "A metric must score layers of the model, at 0 or above, got "
                    f"{score} for {name!r}."
                )
        broken = [name for name, score in scores.items() if not math.isfinite(score)]
        if self._stops:
            check_finite(broken, "score", step=step, layers=len(self._layers))
        self._skipped.update(broken)
        unreached = self.unreached()
        ignored = unreached.union(broken)
        counting = {name: score for name, score in scores.items() if name not in ignored}
        return Assessment(
            scores=agreed_figures(counting, self._names, self._device),
            directions=self.directions(),
            unreached={x.name for x in self._layers if x.name in unreached and x.is_trained},
        )

    @property
    def agreement(self) -> float:
        """Agreement of gradients in standard errors (`AgreementTest`), fixed once significant."""
        return self._agreement.z

    def directions(self) -> dict[str, float]:
        """Return the number of gradient directions by module name (`GradientDirections`)."""
        counts = self._directions.counts(self._layers)
        return agreed_figures(counts, self._names, self._device)

    def unreached(self) -> set[str]:
        """Return the layers without a gradient so far on every process."""
        return names_on_all(self._unreached, self._names, self._device)

    def skipped(self) -> Counter[str]:
        """Return the numbers of non-finite gradients and scores; synchronizes with the device."""
        if self._unread is not None:
            counts = dict(zip(self._names, self._unread.tolist(), strict=True))
            self._skipped.update({name: count for name, count in counts.items() if count})
            self._unread = None
        return Counter(self._skipped)

    def _count_broken(self, finite: Mapping[str, Tensor]) -> None:
        absent = next(iter(finite.values())).new_ones(())
        broken = ~torch.stack([finite.get(name, absent) for name in self._names])
        self._unread = broken.long() if self._unread is None else self._unread + broken

    def finish(self) -> None:
        """Free the last gradients after the last comparison."""
        self._gradients = ConsecutiveGradients()

    def rebase(self, change: BasisChange) -> None:
        """Adapt the state to a change of one layer's rank."""
        self._reduced = False  # an engine may have lost the resized parameters
        self._metric.rebase(change)
        self._gradients.rebase(change)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state that later scores depend on, without the counts."""
        tensors = {
            f"{part}/{key}": value.clone()
            for part, kept in self._parts().items()
            for key, value in kept.state_dict().items()
        }
        return {"proven": torch.tensor(self._proven)} | tensors

    def load_state_dict(
        self, state: Mapping[str, Tensor], *, skipped: Mapping[str, int], unreached: Iterable[str]
    ) -> None:
        """Restore the output of `state_dict`, `skipped` and `unreached`."""
        self._skipped, self._unread = Counter(skipped), None
        self._unreached = set(unreached)
        self._proven = bool(state["proven"])
        for part, kept in self._parts().items():
            prefix = f"{part}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            kept.load_state_dict(own)

    def _parts(self) -> dict[str, _Part]:
        return {
            "metric": self._metric,
            "gradients": self._gradients,
            "agreement": self._agreement,
            "directions": self._directions,
        }


def _check_reduced(layers: Sequence[LoraLayer]) -> None:
    """Check that gradients, by their norms, are bitwise equal on all processes."""
    norms = torch.stack([layer.grad_A.norm() + layer.grad_B.norm() for layer in layers])
    if not torch.equal(max_over_processes(norms), -max_over_processes(-norms)):
        raise EngineError(
            f"Gradients must be the same on all {process_count()} processes, but got others on "
            "each. Call the `DistributedDataParallel`, not the model inside it. With gradient "
            "accumulation, call `observe()` after the last backward only."
        )
