"""An event: observed gradients and inputs in, resized adapters and their record out."""

import logging
import math
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager

import torch

from dynlora.adapters.extension import Extensions
from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.adjuster import adjust, lowest_cost, plan_cut
from dynlora.allocator import allocate, allocate_layer_weights
from dynlora.budget_search import BudgetSearch, falling_budgets
from dynlora.config import DynamicLoraConfig
from dynlora.distributed import agreed_ranks, names_on_all
from dynlora.features import InputFeatureAnalyzer, input_limits
from dynlora.history import Event, LayerEvent
from dynlora.importance.assessor import LayerImportanceAssessor
from dynlora.types import (
    Assessment,
    FeatureStats,
    RankPlan,
    is_informative,
)

logger = logging.getLogger(__name__)


class Stages:
    """The stages in their order, on one adapter and what its assessor and analyzer observed.

    The caller decides when an event comes, and which budget is in force.
    """

    def __init__(
        self,
        config: DynamicLoraConfig,
        adapters: LoraAdapters,
        assessor: LayerImportanceAssessor,
        analyzer: InputFeatureAnalyzer,
        extensions: Extensions,
    ) -> None:
        """Take the parts of a run."""
        self._config = config
        self._adapters = adapters
        self._layers = list(adapters.layers.values())
        self._assessor = assessor
        self._analyzer = analyzer
        self._extensions = extensions
        self._told_unseen = False  # whether the warning about missing inputs was logged
        self._named = set[str]()  # layers without gradients already named in a warning

    def reallocate(self, *, step: int, budget: int, max_rank: int, falls: bool) -> Event:
        """Move ranks by the scores, after a cut of all layers if the budget `falls`."""
        before, features = self._ranks(), self._analyzer.stats()  # stage 3
        cut = self._cut(step, features, budget) if falls else {}
        assessed = self._assessor.assess(features, step=step)  # stage 1
        self._warn_of_missing(assessed, features, step)
        shares = allocate(assessed, self._layers, features, self._config)  # stage 2
        ranks, waits = self._adjust(shares, assessed, features, budget, max_rank)  # stage 4
        if self._config.layer_weights:
            names = [layer.name for layer in self._layers if layer.is_trained]
            self._adapters.apply_weights(allocate_layer_weights(assessed.scores, names))
        plan = RankPlan(step=step, ranks=ranks)
        lost = self._resize(plan, features)  # stage 5
        lost = {name: math.hypot(lost[name], cut.get(name, 0.0)) for name in lost}
        return self._record(step, before, features, assessed, shares, lost, waits)

    def cut_to_need(self, search: BudgetSearch, *, step: int) -> tuple[int, Event]:
        """Cut all layers to the smallest budget that keeps the validation loss, and return it."""
        features = self._analyzer.stats()
        with own_precision(self._adapters.device):
            energies = self._adapters.energies(features)
        lowest = lowest_cost(self._layers, self._config)
        budgets = falling_budgets(self._adapters.parameters, lowest)
        ranks = {budget: self._cut_ranks(energies, budget) for budget in budgets}
        found = search.smallest(budgets, lambda budget: self._adapters.cut(ranks[budget], features))
        with own_precision(self._adapters.device):
            return found, self.resize_to(RankPlan(step=step, ranks=ranks[found]), budget=found)

    def resize_to(self, plan: RankPlan, *, budget: int) -> Event:
        """Resize layers to given ranks, without scores."""
        before, features = self._ranks(), self._analyzer.stats()
        shares = {layer.name: layer.r * layer.cost / budget for layer in self._layers}
        assessed = Assessment(scores={}, directions=self._assessor.directions())
        lost = self._resize(plan, features)
        return self._record(plan.step, before, features, assessed, shares, lost, waits=set())

    def _ranks(self) -> dict[str, int]:
        return {layer.name: layer.r for layer in self._layers}

    def _cut(
        self, step: int, features: Mapping[str, FeatureStats], budget: int
    ) -> dict[str, float]:
        """Drop the weakest directions of all layers.

        Returns the norm of each dropped output, relative to the norm of the layer's output.
        """
        ranks = self._cut_ranks(self._adapters.energies(features), budget)
        plan = RankPlan(step=step, ranks=ranks)
        return self._adapters.apply(plan, features, seed=self._config.seed)

    def _cut_ranks(self, energies: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
        ranks = plan_cut(energies, self._layers, self._config, budget=budget)
        return agreed_ranks(ranks, self._adapters.device)

    def _adjust(
        self,
        shares: Mapping[str, float],
        assessed: Assessment,
        features: Mapping[str, FeatureStats],
        budget: int,
        max_rank: int,
    ) -> tuple[dict[str, int], set[str]]:
        """Plan, measure minimum ranks of layers that would shrink, and plan again until stable."""
        device, minima = self._adapters.device, dict[str, int]()
        limits = input_limits(features)
        while True:
            planned, waits = adjust(
                shares,
                self._layers,
                assessed,
                limits,
                self._config,
                budget=budget,
                max_rank=max_rank,
                minima=minima,
            )
            # All processes follow the first one's plan, so that all measure the same layers.
            ranks = agreed_ranks(planned, device)
            shrinking = [layer.name for layer in self._layers if ranks[layer.name] < layer.r]
            unmeasured = [name for name in shrinking if name not in minima]
            if not unmeasured:
                return ranks, names_on_all(waits, list(ranks), device)
            minima |= self._adapters.lowest_ranks(
                unmeasured, features, tolerance=self._config.shrink_tolerance
            )

    def _resize(self, plan: RankPlan, features: Mapping[str, FeatureStats]) -> dict[str, float]:
        """Resize layers; return the norm of each dropped output, relative to the whole's."""
        lost = self._adapters.apply(plan, features, seed=self._config.seed)
        self._extensions.after_event(lambda: self._adapters.order(features))
        self._analyzer.restart()
        return lost

    def _record(
        self,
        step: int,
        before: Mapping[str, int],
        features: Mapping[str, FeatureStats],
        assessed: Assessment,
        shares: Mapping[str, float],
        lost: Mapping[str, float],
        waits: Set[str],
    ) -> Event:
        layers = {}
        for layer in self._layers:
            name, stats = layer.name, features.get(layer.name)
            layers[name] = LayerEvent(
                rank_before=before[name],
                rank_after=layer.r,
                score=assessed.scores.get(name),
                share=shares[name],
                weight=layer.weight,
                variance=None if stats is None else stats.variance,
                effective_rank=None if stats is None else stats.effective_rank,
                output_lost=lost.get(name, 0.0),
                waits=name in waits,
                directions=assessed.directions.get(name),
            )
        return Event(
            step=step,
            parameters=self._adapters.parameters,
            agreement=self._assessor.agreement,
            layers=layers,
        )

    def _warn_of_missing(
        self, assessed: Assessment, features: Mapping[str, FeatureStats], step: int
    ) -> None:
        """Warn once of missing inputs, and once per layer of missing gradients."""
        if is_informative(assessed.scores) and not features and not self._told_unseen:
            self._told_unseen = True
            logger.warning(
                "no input of any of %d layers was seen up to step %d: new directions are drawn at "
                "random; call the model that `DynamicLora` was given, in training mode",
                len(self._layers),
                step,
            )
        unreached = assessed.lowered - self._named
        if unreached:
            self._named |= unreached
            logger.warning(
                "%d of %d layers had no gradient in any observed step up to step %d, and get the "
                "lowest rank unless they are pinned: %s",
                len(unreached),
                len(self._layers),
                step,
                ", ".join(sorted(unreached)),
            )


def own_precision(device: torch.device) -> AbstractContextManager[None]:
    """Disable the caller's autocast, which would lower the precision of the computations."""
    return torch.autocast(device.type, enabled=False)
