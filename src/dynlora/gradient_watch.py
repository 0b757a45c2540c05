"""Stage 1 in a run: gradients in; finite scores out, equal on all processes."""

import math
from collections.abc import Iterable, Mapping

import torch

from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.checks import check_finite, check_reduced
from dynlora.config import NonFiniteReaction
from dynlora.distributed import agreed_figures, names_on_all, process_count
from dynlora.errors import LayerError
from dynlora.importance import LayerImportanceAssessor
from dynlora.skipped import SkippedObservations
from dynlora.types import Assessment, FeatureStats


class GradientWatch:
    """Passes each step's gradients to the assessor, and returns its assessment at events."""

    def __init__(
        self,
        adapters: LoraAdapters,
        assessor: LayerImportanceAssessor,
        *,
        on_nonfinite: NonFiniteReaction,
    ) -> None:
        """Start without gradients.

        Args:
            adapters: Source of the gradients.
            assessor: Importance assessor.
            on_nonfinite: Whether a non-finite gradient is skipped or stops the run.
        """
        self._adapters = adapters
        self._assessor = assessor
        self._stops = on_nonfinite == "stop"
        self._reduced = False  # whether gradients were checked to be equal on all processes
        self._unreached = set(adapters.layers)
        self.skipped = SkippedObservations(list(adapters.layers))

    def observe(self, *, step: int) -> None:
        """Read one step's gradients; skip the step if only non-LoRA parameters have gradients.

        Args:
            step: Number of the coming optimizer step, from 1.

        Raises:
            EngineError: If gradients differ between processes.
            LayerError: If no parameter of the model has a gradient, or the adapter was deleted.
            NonFiniteError: If a gradient is not finite and `on_nonfinite` is "stop".
        """
        layers = self._adapters.with_gradients()
        if not layers and self._adapters.model_has_gradients:
            return
        if not layers:
            raise LayerError(
                f"At least one of {len(self._adapters.layers)} LoRA layers must have a gradient, "
                "got none: call `observe()` after `loss.backward()` and before `zero_grad()`; "
                "under DeepSpeed between `engine.backward` and `engine.step`."
            )
        finite = {layer.name: layer.finite for layer in layers}
        self._unreached.difference_update(finite)
        if self._stops:
            flags = torch.stack(list(finite.values())).tolist()
            broken = [name for name, kept in zip(finite, flags, strict=True) if not kept]
            check_finite(broken, "gradient", step=step, layers=len(self._adapters.layers))
        self.skipped.add_broken(finite)
        if process_count() > 1 and not self._reduced and all(finite.values()):
            check_reduced(self._adapters.gradient_norms())
            self._reduced = True
        self._assessor.observe(layers)

    def assess(self, features: Mapping[str, FeatureStats], *, step: int) -> Assessment:
        """Return scores, gradient directions and unreached layers; no scores before agreement.

        Args:
            features: Input statistics by module name.
            step: Optimizer steps taken.

        Raises:
            NonFiniteError: If a score is not finite and `on_nonfinite` is "stop".
        """
        scores = self._assessor.scores(list(self._adapters.layers.values()), features)
        broken = [name for name, score in scores.items() if not math.isfinite(score)]
        if self._stops:
            check_finite(broken, "score", step=step, layers=len(self._adapters.layers))
        self.skipped.add(broken)
        layers, unreached = self._adapters.layers, self.unreached()
        counting = {
            name: score
            for name, score in scores.items()
            if math.isfinite(score) and name not in unreached
        }
        return Assessment(
            scores=self._agreed(counting),
            directions=self.directions(),
            unreached={name for name in unreached if layers[name].is_trained},
        )

    def unreached(self) -> set[str]:
        """Return the layers without a gradient so far on every process."""
        return names_on_all(self._unreached, list(self._adapters.layers), self._adapters.device)

    def load_unreached(self, names: Iterable[str]) -> None:
        """Restore the output of `unreached`."""
        self._unreached = set(names)

    def directions(self) -> dict[str, float]:
        """Return the number of output directions of the gradients, by module name."""
        return self._agreed(self._assessor.directions(list(self._adapters.layers.values())))

    def _agreed(self, figures: Mapping[str, float]) -> dict[str, float]:
        return agreed_figures(figures, list(self._adapters.layers), self._adapters.device)
