"""Controller: calls the stages in order; gradients and inputs in, resized adapters out."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dynlora import schedule
from dynlora.adapters.extension import Extension, Extensions, Host, saved_extensions
from dynlora.adapters.hooks import ActivationTaps
from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.adapters.owners import let_go, take_over
from dynlora.adjuster import adjust, check_plan, check_room, lowest_cost, plan_cut
from dynlora.allocator import allocate, allocate_layer_weights
from dynlora.budget_search import BudgetSearch, Validate, falling_budgets
from dynlora.config import DynamicLoraConfig
from dynlora.distributed import agreed_ranks, names_on_all, process_count
from dynlora.engines.compiled import is_compiled
from dynlora.engines.ddp import unwrapped
from dynlora.engines.deepspeed import AnyOptimizer
from dynlora.errors import ConfigError, EngineError, LayerError, ResumeError, check_finite
from dynlora.features import InputFeatureAnalyzer, input_limits
from dynlora.fused.layers import FusedLora, close_fused
from dynlora.importance import build_metric
from dynlora.importance.assessor import LayerImportanceAssessor
from dynlora.types import (
    Assessment,
    BasisChange,
    Event,
    FeatureStats,
    LayerEvent,
    RankPlan,
    is_informative,
    is_scored,
    nothing_compared,
    stillness,
)

logger = logging.getLogger(__name__)


class DynamicLora:
    """Moves one budget of LoRA parameters between layers while the model trains.

    Example:
        >>> dynamic = DynamicLora(model, optimizer, DynamicLoraConfig(total_steps=1000))
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     dynamic.observe()  # gradients must be unscaled and clipped
        ...     optimizer.step()
        ...     dynamic.step()  # ranks change only here
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer,
        config: DynamicLoraConfig,
        *,
        adapter_name: str | None = None,
        validate: Validate | None = None,
        extensions: Sequence[Extension] = (),
    ) -> None:
        """Attach to the LoRA layers of a PEFT model.

        Args:
            model: The PEFT model, compiled or not, inside its `DistributedDataParallel` or before
                it is wrapped, sharded by FSDP2's `fully_shard`, or inside DeepSpeed's engine. A
                `DynamicLora` already attached to the same adapter is closed.
            optimizer: Optimizer of the LoRA parameters, of a kind that `adapters.optimizer_state`
                supports. Under DeepSpeed, the optimizer that DeepSpeed returns.
            config: Settings.
            adapter_name: The adapter to resize; None for the active one.
            validate: Returns the model's mean validation loss, for `budget_end="auto"`. It is
                called in eval mode without gradients, about a dozen times per run.
            extensions: Your own extensions, in addition to those that `config` switches on.

        Raises:
            BudgetError: If the budget, at the start or with `budget_end`, does not fit between
                `min_rank` and `max_rank`.
            ConfigError: If a pattern in `pinned` matches no layer, the metric needs attention that
                cannot be read, two extensions are of one class, a setting supports one process
                only, or `budget_end` needs `total_steps` or `validate`.
            EngineError: If the model runs under an unsupported engine.
            LayerError: If the model has no LoRA layer, a layer cannot be resized, the adapter was
                initialized from the base weights (PiSSA and others), or the model does not support
                the configured input-adaptive ranks.
            OptimizerError: If the optimizer's state cannot follow a change of rank.
        """
        compiled = is_compiled(model)
        model = unwrapped(model)
        self.config = config
        self.history: list[Event] = []
        """All events so far."""
        self.seconds = 0.0
        """Wall time spent on observing and reallocating."""
        metric = build_metric(config.importance, seed=config.seed)
        self._adapters = LoraAdapters(
            model, optimizer, adapter_name, follow=self._follow, compiled=compiled
        )
        self._layers = list(self._adapters.layers.values())
        self._assessor = LayerImportanceAssessor(
            metric,
            self._layers,
            device=self._adapters.device,
            stops=config.on_nonfinite == "stop",
        )
        self.budget = self._first_budget = self._adapters.budget
        """Parameter budget of all layers together, which falls at events with `budget_end`."""
        self._max_rank = config.highest_rank(self._adapters.configured_rank, self.ranks.values())
        check_room(self._layers, config, budget=self.budget, max_rank=self._max_rank)
        _check_input_adaptive(config, processes=process_count(), compiled=compiled)
        self._analyzer = InputFeatureAnalyzer(list(self._adapters.layers), self._adapters.device)
        self._events = schedule.event_steps(config)
        self._late_events = schedule.late_event_steps(config)
        self._searches = schedule.search_steps(config)
        if self._searches and validate is None:
            raise ConfigError('`budget_end="auto"` needs `validate`, got None.')
        self._search = BudgetSearch(
            model,
            validate or float,
            tolerance=config.budget_tolerance / max(len(self._searches), 1),
            device=self._adapters.device,
        )
        self._step = 0
        self._frozen = False
        self._observed = False  # whether gradients were read since the last step
        self._told_unseen = False  # whether the warning about missing inputs was logged
        self._named = set[str]()  # layers without gradients already named in a warning
        self._forwards = ActivationTaps(
            model,
            self._layers,
            self._analyzer,
            compiled=compiled,
            timed=self._timed,
        )
        host = Host(model=model, layers=self._layers, timed=self._timed)
        self._extensions = Extensions(config, extensions, metric, host)
        self._extensions.attach()
        # All checks passed: the model and the optimizer change only below.
        if take_over(self._layers, self):
            logger.info("an earlier `DynamicLora` was attached to this adapter: it is closed")
        self._adapters.write_config()
        self._adapters.open()
        self._fused = FusedLora(model) if config.fused else None
        for setting in self._extensions.remove_others(self._layers):
            logger.warning("`%s` was on for this adapter, and is off from here on", setting)
        if self._fused is None:
            close_fused(model)  # left by an unclosed controller
        self._begin_step()

    @property
    def ranks(self) -> dict[str, int]:
        """Live rank by module name."""
        return {layer.name: layer.r for layer in self._layers}

    @property
    def input_adaptive(self) -> Any:
        """`InputAdaptiveRanks`, which select components per example; None unless configured."""
        return self._extensions.by_name.get("input_adaptive")

    @property
    def parameters(self) -> int:
        """Live LoRA parameters."""
        return self._adapters.parameters

    @property
    def peak_parameters(self) -> int:
        """Highest number of LoRA parameters so far."""
        return self._adapters.peak_parameters

    @property
    def lost_by_search(self) -> float | None:
        """Part of the reduction of the validation loss that searched cuts undid; None without."""
        return self._search.lost if self._searches else None

    @property
    def skipped(self) -> Counter[str]:
        """Number of gradients and scores skipped as NaN or infinite, by module name.

        Reading this property synchronizes with the device.
        """
        return self._assessor.skipped()

    def observe(self) -> None:
        """Read the gradients, unscaled and clipped, between `backward` and the optimizer's step.

        DeepSpeed clips inside `engine.step`, so its gradients are read unclipped. Under
        Accelerate's `accumulate`, with Accelerate's optimizer, only the last batch of each step
        counts. If events are far apart, most steps are skipped (`schedule.is_observed`),
        unless `on_nonfinite` is "stop".

        Raises:
            EngineError: If called twice before `step()`, or if gradients differ between processes.
            LayerError: If no parameter of the model has a gradient, or the adapter was deleted.
            NonFiniteError: If a gradient is not finite and `on_nonfinite` is "stop".
        """
        if self._frozen or self._adapters.is_accumulating:
            return
        if self._step == 0 and self._searches:
            self._search.start_loss = self._search.loss()
        if self._step + 1 in self._stops:
            self._adapters.step_watch.begin()
        unneeded = self.config.on_nonfinite == "skip" and not schedule.is_observed(
            self._stops, self._step
        )
        if unneeded or self._events_are_over():
            return
        if self._observed:  # sums of accumulated gradients would seem to agree
            raise EngineError(
                "Gradients must be read once a step, got a second call of `observe()` before "
                "`step()`: call `step()` after a step that the optimizer leaves out too; with "
                "gradient accumulation make both calls after the last `backward` alone; inside "
                "`accelerator.accumulate(model)` give what `accelerator.prepare` made of the "
                "optimizer."
            )
        with self._timed(), self._in_own_precision():
            layers = self._adapters.with_gradients()
            if layers:
                self._assessor.observe(layers, step=self._step + 1)
                self._forwards.after_backward()
            elif not self._adapters.model_has_gradients:
                raise LayerError(
                    f"At least one of {len(self._layers)} LoRA layers must have a gradient, got "
                    "none: call `observe()` after `loss.backward()` and before `zero_grad()`; "
                    "under DeepSpeed between `engine.backward` and `engine.step`."
                )
            self._observed = True

    def step(self) -> None:
        """Count the optimizer's step, and change ranks if it is an event.

        Raises:
            BudgetError: If the lowest ranks exceed the budget, which only a plan passed to `apply`,
                a `rank_pattern` below `min_rank` or layers frozen before a cut can cause.
            LayerError: At an event, if the adapter is merged or was deleted.
            NonFiniteError: At an event, if a weight is not finite, or if a score is not finite and
                `on_nonfinite` is "stop".
            OptimizerError: At an event, if a different optimizer took the step.
        """
        if self._adapters.is_accumulating:
            return
        moves = not self._events_are_over()
        self._step += 1
        self._observed = False
        if self._frozen:
            self._begin_step()
            return
        with self._timed():
            if self._step in self._searches:
                self._cut_to_need()
            elif moves and self._step in self._events + self._late_events:
                with self._in_own_precision():
                    self._reallocate()
            self._begin_step()
            if self._is_over():
                self.freeze()
                if why := stillness(self.history):
                    level = logging.WARNING if nothing_compared(self.history) else logging.INFO
                    logger.log(level, "no rank moved in %d events: %s", len(self.history), why)

    def freeze(self) -> None:
        """Fix the ranks and the input-adaptive thresholds, and stop observing."""
        self._frozen = True
        self._assessor.finish()
        self._forwards.close()
        self._extensions.freeze()

    def close(self) -> None:
        """Remove every hook and fused forward; the model keeps training as plain LoRA.

        With `input_adaptive` the outputs change, because every example then uses every component.
        """
        self.freeze()
        let_go(self._layers, self)
        self._adapters.close()
        self._extensions.close()
        if self._fused is not None:
            self._fused.close()

    def apply(self, plan: RankPlan) -> Event:
        """Resize layers to the ranks of the caller's plan.

        The plan is limited by the budget. It overrides `pinned`, `min_rank`, `max_rank` and
        `shrink_tolerance`. All processes must call this method.

        Args:
            plan: Rank by module name, for some or all layers.

        Raises:
            BudgetError: If the plan names an unknown layer, contains a rank that is not an integer
                of at least 1, or exceeds the budget.
            LayerError: If the adapter is merged.
            NonFiniteError: If a weight is not finite.
        """
        check_plan(plan, self._layers, self.budget)
        plan = replace(plan, ranks={name: int(rank) for name, rank in plan.ranks.items()})
        self._check_layers()
        with self._in_own_precision():
            features = self._analyzer.stats()
            return self._resize_unscored(plan, features)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the rest of the run needs besides weights and moments.

        All processes must call this method, because it joins their input samples; all get the same
        result. "importance", "features" and "extensions" contain tensors; all other values are
        JSON-ready.
        """
        return {
            "config": self.config.to_dict(),
            "budget": self._first_budget,
            "budget_left": self.budget,
            "max_rank": self._max_rank,
            "step": self._step,
            "frozen": self._frozen,
            "events": list(self._events),
            "late_events": list(self._late_events),
            "search": {
                "steps": list(self._searches),
                "start_loss": self._search.start_loss,
                "lost": self._search.lost,
            },
            "layers": self._adapters.shapes(),
            "history": [event.to_dict() for event in self.history],
            "skipped": dict(self.skipped),
            "unreached": sorted(self._assessor.unreached()),
            "seconds": self.seconds,
            "peak_parameters": self.peak_parameters,
            "importance": self._assessor.state_dict(),
            "features": self._analyzer.state_dict(),
            "extensions": self._extensions.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved run: call before loading model and optimizer, because it sets shapes.

        A frozen or closed controller observes again, unless the saved run was frozen.

        Args:
            state: Output of `state_dict` in a run with the same model and configuration.

        Raises:
            ResumeError: If layers, budget or configuration differ.
        """
        saved_ranks = {name: shape["r"] for name, shape in state["layers"].items()}
        # An adapter saved by this run has its last ranks, from which the budget cannot be derived.
        budget = state["budget"] if self.ranks == saved_ranks else self._first_budget
        self._check_same_run(state, budget)
        take_over(self._layers, self)
        self._first_budget, self._max_rank = budget, state["max_rank"]
        self._adapters.load_shapes(state["layers"])
        self._adapters.peak_parameters = state["peak_parameters"]
        self._step = state["step"]
        self._events = tuple(state["events"])
        # Early versions had neither late events nor cuts of the budget.
        self._late_events = tuple(state.get("late_events", ()))
        self.budget = state.get("budget_left", budget)
        search = {"steps": [], "start_loss": None, "lost": 0.0} | state.get("search", {})
        self._searches, self._search.start_loss = tuple(search["steps"]), search["start_loss"]
        self._search.lost = search["lost"]
        self.history = [Event.from_dict(event) for event in state["history"]]
        self.seconds = state["seconds"]
        if self._fused is not None:
            self._fused.open()
        device = self._adapters.device  # the state's tensors may be on the CPU
        self._assessor.load_state_dict(
            {key: value.to(device) for key, value in state["importance"].items()},
            skipped=state["skipped"],
            unreached=state["unreached"],
        )
        self._analyzer.load_state_dict({k: v.to(device) for k, v in state["features"].items()})
        self._extensions.attach()
        self._extensions.load_state_dict(saved_extensions(state))
        self._adapters.open()
        self._frozen = self._observed = False
        self._begin_step()
        if state["frozen"] or self._is_over():
            self.freeze()

    def take_shapes(self, state: Mapping[str, Any]) -> None:
        """Load only ranks, their budget, scales and extensions, with weights of the same step.

        Statistics of gradients and features stay as they are.

        Args:
            state: Output of `state_dict` at an earlier step of this run.
        """
        self._adapters.load_shapes(state["layers"])
        self.budget = state.get("budget_left", state["budget"])
        self._extensions.load_state_dict(saved_extensions(state))

    def _follow(self, change: BasisChange) -> None:
        self._assessor.rebase(change)

    def _in_own_precision(self) -> AbstractContextManager[None]:
        """Disable the caller's autocast, which would lower the precision of the computations."""
        return torch.autocast(self._adapters.device.type, enabled=False)

    @property
    def _stops(self) -> list[int]:
        """All steps after which ranks may change."""
        return sorted({*self._events, *self._late_events, *self._searches})

    def _is_over(self) -> bool:
        """Return whether no rank will change any more."""
        return self._events_are_over() and self._step >= max(self._searches, default=0)

    def _events_are_over(self) -> bool:
        """Return whether the last event has passed; a run with few scored events has late ones."""
        if self._step < self._events[-1]:
            return False
        scored = sum(map(is_scored, self.history))
        if scored >= min(schedule.SCORED_EVENTS, self.config.events):
            return True
        return self._step >= (self._events + self._late_events)[-1]

    def _begin_step(self) -> None:
        """Install the forward hooks if the next step is sampled; remove them otherwise."""
        sampled = not self._frozen and schedule.is_sampled(self._stops, self._step)
        if sampled:
            self._forwards.open(self._step)
        else:
            self._forwards.close()
        self._extensions.begin_step(self._step, sampled=sampled)

    def _reallocate(self) -> None:
        """Run one event: the stages in order. Stages 1 and 2 use the features of stage 3."""
        self._check_layers()
        before, features = self.ranks, self._analyzer.stats()
        cut = self._cut(features)
        assessed = self._assessor.assess(features, step=self._step)  # stage 1
        self._warn_of_missing(assessed, features)
        shares = allocate(assessed, self._layers, features, self.config)  # stage 2
        limits = input_limits(features)  # stage 3
        ranks, waits = self._adjust(shares, assessed, features, limits)  # stage 4
        if self.config.layer_weights:
            names = [layer.name for layer in self._layers if layer.is_trained]
            self._adapters.apply_weights(allocate_layer_weights(assessed.scores, names))
        plan = RankPlan(step=self._step, ranks=ranks)
        self._resize(  # stage 5
            plan, features, assessed, shares=shares, waits=waits, before=before, cut=cut
        )

    def _budget_now(self) -> int:
        """Return the budget that is planned after the events up to this step."""
        if self._searches:
            return self.budget
        passed = sum(event <= self._step for event in self._events) / len(self._events)
        return self.config.budget_left(self._first_budget, passed=passed)

    def _cut(self, features: Mapping[str, FeatureStats]) -> dict[str, float]:
        """Drop the weakest directions of all layers if the budget falls at this event.

        Returns the norm of each dropped output, relative to the norm of the layer's output.
        """
        budget = self._budget_now()
        if budget == self.budget:
            return {}
        ranks = self._cut_ranks(self._adapters.energies(features), budget)
        self.budget = budget
        plan = RankPlan(step=self._step, ranks=ranks)
        return self._adapters.apply(plan, features, seed=self.config.seed)

    def _cut_ranks(self, energies: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
        ranks = plan_cut(energies, self._layers, self.config, budget=budget)
        return agreed_ranks(ranks, self._adapters.device)

    def _cut_to_need(self) -> None:
        """Cut all layers to the smallest budget that keeps the validation loss."""
        self._check_layers()
        features = self._analyzer.stats()
        with self._in_own_precision():
            energies = self._adapters.energies(features)
        budgets = falling_budgets(self.parameters, lowest_cost(self._layers, self.config))
        ranks = {budget: self._cut_ranks(energies, budget) for budget in budgets}
        self.budget = self._search.smallest(
            budgets, lambda budget: self._adapters.cut(ranks[budget], features)
        )
        with self._in_own_precision():
            plan = RankPlan(step=self._step, ranks=ranks[self.budget])
            self._resize_unscored(plan, features)
        logger.info(
            "step %d: %d of %d parameters are left", self._step, self.parameters, self._first_budget
        )

    def _resize_unscored(self, plan: RankPlan, features: Mapping[str, FeatureStats]) -> Event:
        assessed = Assessment(scores={}, directions=self._assessor.directions())
        shares = {layer.name: layer.r * layer.cost / self.budget for layer in self._layers}
        return self._resize(
            plan, features, assessed, shares=shares, waits=set(), before=self.ranks, cut={}
        )

    def _adjust(
        self,
        shares: Mapping[str, float],
        assessed: Assessment,
        features: Mapping[str, FeatureStats],
        limits: dict[str, float],
    ) -> tuple[dict[str, int], set[str]]:
        """Plan, measure minimum ranks of layers that would shrink, and plan again until stable."""
        device, minima = self._adapters.device, dict[str, int]()
        while True:
            planned, waits = adjust(
                shares,
                self._layers,
                assessed,
                limits,
                self.config,
                budget=self.budget,
                max_rank=self._max_rank,
                minima=minima,
            )
            # All processes follow the first one's plan, so that all measure the same layers.
            ranks = agreed_ranks(planned, device)
            shrinking = [layer.name for layer in self._layers if ranks[layer.name] < layer.r]
            unmeasured = [name for name in shrinking if name not in minima]
            if not unmeasured:
                return ranks, names_on_all(waits, list(ranks), device)
            minima |= self._adapters.lowest_ranks(
                unmeasured, features, tolerance=self.config.shrink_tolerance
            )

    def _warn_of_missing(self, assessed: Assessment, features: Mapping[str, FeatureStats]) -> None:
        """Warn once of missing inputs, and once per layer of missing gradients."""
        if is_informative(assessed.scores) and not features and not self._told_unseen:
            self._told_unseen = True
            logger.warning(
                "no input of any of %d layers was seen up to step %d: new directions are drawn at "
                "random; call the model that `DynamicLora` was given, in training mode",
                len(self._layers),
                self._step,
            )
        unreached = assessed.lowered - self._named
        if unreached:
            self._named |= unreached
            logger.warning(
                "%d of %d layers had no gradient in any observed step up to step %d, and get the "
                "lowest rank unless they are pinned: %s",
                len(unreached),
                len(self._layers),
                self._step,
                ", ".join(sorted(unreached)),
            )

    def _resize(
        self,
        plan: RankPlan,
        features: Mapping[str, FeatureStats],
        assessed: Assessment,
        *,
        shares: Mapping[str, float],
        waits: set[str],
        before: Mapping[str, int],
        cut: Mapping[str, float],
    ) -> Event:
        """Apply a plan and record the event: ranks `before` it, and losses of its `cut`."""
        lost = self._adapters.apply(plan, features, seed=self.config.seed)
        self._extensions.after_event(lambda: self._adapters.order(features))
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
                output_lost=math.hypot(lost.get(name, 0.0), cut.get(name, 0.0)),
                waits=name in waits,
                directions=assessed.directions.get(name),
            )
        event = Event(
            step=plan.step,
            parameters=self.parameters,
            agreement=self._assessor.agreement,
            layers=layers,
        )
        self.history.append(event)
        self._analyzer.restart()
        moved = sum(layer.rank_before != layer.rank_after for layer in layers.values())
        logger.info("step %d: the ranks of %d layers moved", plan.step, moved)
        return event

    def _check_same_run(self, state: Mapping[str, Any], budget: int) -> None:
        """Check that layers, budget and settings, except `total_steps`, are equal."""
        names = sorted(self._extensions.by_name)
        given = {"budget": budget, **self.config.to_dict(), "extensions": names}
        saved_names = self._extensions.saved_names(saved_extensions(state))
        saved = {"budget": state["budget"], **state["config"], "extensions": saved_names}
        # Early versions had fewer settings, and behaved as with the defaults of later ones.
        saved = DynamicLoraConfig().to_dict() | saved
        for key, value in given.items():
            same = json.dumps(value) == json.dumps(saved.get(key))
            if key != "total_steps" and not same:
                raise ResumeError(
                    f"A run resumes with the settings it began with: `{key}` was {saved.get(key)}, "
                    f"now {value}. Restore it, or start a new run."
                )
        differing = set(state["layers"]) ^ set(self._adapters.layers)
        if differing:
            raise ResumeError(
                "The saved state must be of this model's LoRA layers, got "
                f"{len(state['layers'])} layers where the model has {len(self._layers)}; "
                f"{sorted(differing)[0]!r} is in one of them only. Resume with the model and "
                "`target_modules` it was trained with."
            )

    def _check_layers(self) -> None:
        self._adapters.reshard()
        self._adapters.check_unmerged()
        self._adapters.step_watch.end()
        broken = self._adapters.broken_weights()
        check_finite(broken, "weights", step=self._step, layers=len(self._layers))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def _check_input_adaptive(config: DynamicLoraConfig, *, processes: int, compiled: bool) -> None:
    if config.input_adaptive and (compiled or processes > 1):
        where = "compiled models" if compiled else f"{processes} processes"
        raise ConfigError(
            f"`input_adaptive` must be false in {where}, but got true: its hooks break compiled "
            "graphs, and its thresholds follow one process. Turn it off, or train without these."
        )
