"""Controller: calls the stages in order; gradients and inputs in, resized adapters out."""

import json
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from dynlora.adapters.extension import Extension, Extensions, Host
from dynlora.adapters.hooks import ActivationTaps
from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.adapters.owners import let_go, take_over
from dynlora.adjuster import check_plan, check_room
from dynlora.budget_search import BudgetSearch, Validate
from dynlora.config import DynamicLoraConfig
from dynlora.distributed import process_count
from dynlora.engines.compiled import is_compiled
from dynlora.engines.ddp import unwrapped
from dynlora.engines.deepspeed import AnyOptimizer
from dynlora.errors import ConfigError, EngineError, LayerError, ResumeError
from dynlora.event import Stages, own_precision
from dynlora.features import InputFeatureAnalyzer
from dynlora.fused.layers import FusedLora, close_fused
from dynlora.history import Event, conclusion, describe, is_scored, stillness, summary
from dynlora.importance import build_metric
from dynlora.importance.assessor import LayerImportanceAssessor
from dynlora.schedule import Timetable, is_observed, is_sampled
from dynlora.types import BasisChange, RankPlan

logger = logging.getLogger(__name__)


class DynamicLora:
    """Moves one budget of LoRA parameters between layers while the model trains.

    Examples:
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
        self._timetable = Timetable.of(config)
        if self._timetable.search and validate is None:
            raise ConfigError('`budget_end="auto"` needs `validate`, got None.')
        self._search = BudgetSearch(
            model,
            validate or float,
            tolerance=config.budget_tolerance / 2,
            device=self._adapters.device,
        )
        self._step = 0
        self._frozen = False
        self._observed = False  # whether gradients were read since the last step
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
        self._stages = Stages(
            config, self._adapters, self._assessor, self._analyzer, self._extensions
        )
        # All checks passed: the model and the optimizer change only below.
        if take_over(self._layers, self):
            logger.info("an earlier `DynamicLora` was attached to this adapter: it is closed")
            self._extensions.attach()  # one that both were given was closed with the earlier one
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

    def summary(self) -> str:
        """Return a table of all layers, with their first and present ranks and the last figures."""
        return summary(self.ranks, self.history)

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
        """Part of the reduction of the validation loss that the search undid; None before it."""
        return self._search.lost

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
        if self._step == 0 and self._timetable.search:
            self._search.start_loss = self._search.loss()
        changes = self._timetable.changes
        if self._step + 1 in changes:
            self._adapters.step_watch.begin()
        unneeded = self.config.on_nonfinite == "skip" and not is_observed(changes, self._step)
        if unneeded or self._timetable.events_are_over(self._step, self._scored):
            return
        if self._observed:  # sums of accumulated gradients would seem to agree
            raise EngineError(
                "Gradients must be read once a step, got a second call of `observe()` before "
                "`step()`: call `step()` after a step that the optimizer leaves out too; with "
                "gradient accumulation make both calls after the last `backward` alone; inside "
                "`accelerator.accumulate(model)` give what `accelerator.prepare` made of the "
                "optimizer."
            )
        with self._timed(), own_precision(self._adapters.device):
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
        moves = not self._timetable.events_are_over(self._step, self._scored)
        self._step += 1
        self._observed = False
        if self._frozen:
            self._begin_step()
            return
        with self._timed():
            if self._step == self._timetable.search:
                self._cut_to_need()
            elif moves and self._timetable.is_event(self._step):
                self._reallocate()
            self._begin_step()
            if self._timetable.is_over(self._step, self._scored):
                self.freeze()
                if (why := stillness(self.history)) is None:
                    logger.info(conclusion(self.history))
                elif self.config.importance != "uniform":
                    logger.warning("no rank moved in %d events: %s", len(self.history), why)

    def freeze(self) -> None:
        """Fix the ranks and the input-adaptive thresholds, and stop observing."""
        self._frozen = True
        self._assessor.finish()
        self._forwards.close()
        self._adapters.step_watch.close()
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
        self._adapters.check(self._step)
        with own_precision(self._adapters.device):
            return self._record(self._stages.resize_to(plan, budget=self.budget))

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
            "timetable": asdict(self._timetable),
            "search": self._search.state_dict(),
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
        self._timetable = Timetable.from_dict(state["timetable"])
        self._search.load_state_dict(state["search"])
        self.budget = state["budget_left"]
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
        self._extensions.load_state_dict(state["extensions"])
        self._adapters.open()
        self._frozen = self._observed = False
        self._begin_step()
        if state["frozen"] or self._timetable.is_over(self._step, self._scored):
            self.freeze()

    def take_shapes(self, state: Mapping[str, Any]) -> None:
        """Return to the ranks, budget and scales of a step whose weights come next.

        Its extensions, events and search return too; statistics of gradients and features stay.

        Args:
            state: Output of `state_dict` at an earlier step of this run.
        """
        self._adapters.load_shapes(state["layers"])
        self.budget = state["budget_left"]
        self.history = [Event.from_dict(event) for event in state["history"]]
        self._search.load_state_dict(state["search"])
        self._extensions.load_state_dict(state["extensions"])
        logger.info("ranks are those of step %d again", state["step"])

    def _follow(self, change: BasisChange) -> None:
        self._assessor.rebase(change)

    @property
    def _scored(self) -> int:
        """Number of events with scores so far."""
        return sum(map(is_scored, self.history))

    def _begin_step(self) -> None:
        """Install the forward hooks if the next step is sampled; remove them otherwise."""
        sampled = not self._frozen and is_sampled(self._timetable.changes, self._step)
        if sampled:
            self._forwards.open(self._step)
        else:
            self._forwards.close()
        self._extensions.begin_step(self._step, sampled=sampled)

    def _reallocate(self) -> None:
        """Run an event, with the budget that is planned after it."""
        self._adapters.check(self._step)
        before = self.budget
        if not self._timetable.search:
            passed = self._timetable.passed(self._step)
            self.budget = self.config.budget_left(self._first_budget, passed=passed)
        with own_precision(self._adapters.device):
            event = self._stages.reallocate(
                step=self._step,
                budget=self.budget,
                max_rank=self._max_rank,
                falls=self.budget != before,
            )
        self._record(event)

    def _cut_to_need(self) -> None:
        """Lower the budget to what the validation loss needs."""
        self._adapters.check(self._step)
        self.budget, event = self._stages.cut_to_need(self._search, step=self._step)
        self._record(event)
        logger.info(
            "step %d: %d of %d parameters are left", self._step, self.parameters, self._first_budget
        )

    def _record(self, event: Event) -> Event:
        self.history.append(event)
        logger.info("step %d: %s", event.step, describe(event))
        return event

    def _check_same_run(self, state: Mapping[str, Any], budget: int) -> None:
        """Check that layers, budget and settings, except `total_steps`, are equal."""
        names = sorted(self._extensions.by_name)
        given = {"budget": budget, **self.config.to_dict(), "extensions": names}
        saved_names = self._extensions.saved_names(state["extensions"])
        saved = {"budget": state["budget"], **state["config"], "extensions": saved_names}
        for key, value in given.items():
            same = json.dumps(value) == json.dumps(saved.get(key))
            if key != "total_steps" and not same:
                raise ResumeError(
                    f"A run resumes with the settings it began with: `{key}` was {saved.get(key)}, "
                    f"now {value}. Restore it, or start a new run."
                )
        check_same_layers(state["layers"], self._adapters.layers)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def check_same_layers(saved: Collection[str], present: Collection[str]) -> None:
    """Raise `ResumeError` if the names of saved LoRA layers are not those of the model."""
    if differing := set(saved) ^ set(present):
        raise ResumeError(
            f"The saved state must be of this model's LoRA layers, got {len(saved)} layers where "
            f"the model has {len(present)}; {sorted(differing)[0]!r} is in one of them only. "
            "Resume with the model and `target_modules` it was trained with."
        )


def _check_input_adaptive(config: DynamicLoraConfig, *, processes: int, compiled: bool) -> None:
    if config.input_adaptive and (compiled or processes > 1):
        where = "compiled models" if compiled else f"{processes} processes"
        raise ConfigError(
            f"`input_adaptive` must be false in {where}, but got true: its hooks break compiled "
            "graphs, and its thresholds follow one process. Turn it off, or train without these."
        )
