"""Random sequences of what users do, each operation compared with stock PEFT and the invariants."""

import copy
import logging
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel, get_peft_model
from torch import Tensor

from dynlora import RankPlan
from dynlora.errors import BudgetError, LayerError
from tests.stateful import oracles
from tests.stateful.models import SETTINGS, Settings, add_other
from tests.stateful.oracles import Reference, Tensors, parameters, saved_ranks, weights
from tests.stateful.wirings import AROUND, LASTING, VOCABULARY, between, lora_layers

BATCHES = st.integers(0, 2)
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
PLANS = st.dictionaries(st.integers(0, 3), st.integers(1, 8), min_size=1)

attached = precondition(lambda self: self.dynamic is not None)
unmerged = precondition(lambda self: not self.merged)
plain = precondition(lambda self: not self.merged and self.model.active_adapter == "default")


@contextmanager
def accepted_by_peft() -> Iterator[None]:
    """Name the promise where PEFT refuses the adapter's files, or its configuration."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise AssertionError(f"stock PEFT loads what was saved: {error!r}") from error


class Sequence(RuleBasedStateMachine):
    """One model, its optimizer and its controller in the hands of a user."""

    @initialize(chosen=SETTINGS)
    def begin(self, chosen: Settings) -> None:
        self.settings, self.dynamic = chosen, None
        model = chosen.model()
        self.scalings = {n: m.scaling["default"] for n, m in lora_layers(model).items()}
        self.reference = Reference(chosen, self.scalings)
        self.start(model)

    def start(self, model: PeftModel) -> None:
        """Train a model from here on, with an optimizer and a controller of its own."""
        self.model, self.optimizer = model, self.settings.new_optimizer(model)
        self.held = oracles.identities(self.optimizer)
        self.hooks_before = self.hooks()
        self.attach()

    def attach(self) -> None:
        """Attach a controller; an adapter that is refused is taken for one of another start."""
        try:
            self.dynamic = self.settings.attach(self.model, self.optimizer)
        except LayerError:
            if self.settings.start != "orthogonal":
                raise
            self.model.peft_config["default"].init_lora_weights = True
            self.dynamic = self.settings.attach(self.model, self.optimizer)
        self.config = copy.deepcopy(self.model.peft_config["default"])
        ranks, self.reached = saved_ranks(self.model), set()
        at_r = parameters(self.model, dict.fromkeys(ranks, self.config.r))
        self.budget = max(at_r, parameters(self.model, ranks))

    def hooks(self):
        return oracles.hooks_of(self.model, self.optimizer)

    @property
    def merged(self) -> bool:
        return lora_layers(self.model)[self.settings.names[0]].merged

    # Forwards and steps.

    def forward(self, model: PeftModel, batch: int, change: str = "nothing") -> Tensor:
        base = model.get_base_model()
        skips = {"never": False, "sometimes": batch == 1, "always": True}[self.settings.skips]
        base.skipped = frozenset({"q", "left"} & set(self.settings.names) if skips else ())
        base.between = partial(between, model, change)
        ids = torch.Generator().manual_seed(batch)
        tokens, said = torch.randint(0, VOCABULARY, (2, 2, 3), generator=ids)
        torch.default_generator.manual_seed(batch)  # of dropout
        autocast = self.settings.dtype == "autocast"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(tokens, said)

    def evaluated(self, model: PeftModel) -> Tensors:
        with torch.no_grad():
            return {"output": self.forward(model, 0)}

    def passes(self, batches, *, change="nothing", together=True, meanwhile="nothing") -> None:
        """Make forwards and backward passes, compare them with PEFT's, and leave the gradients."""

        def loss(output: Tensor, batch: int) -> Tensor:
            targets = torch.randn(output.shape, generator=torch.Generator().manual_seed(batch))
            return (output - targets.to(output)).square().mean()

        def act(model: PeftModel) -> Tensors:
            outputs = []
            for batch in batches:
                outputs.append(self.forward(model, batch, change))
                if not together:
                    loss(outputs[-1], batch).backward()
            self.interrupt(model, meanwhile)
            if together:
                sum(map(loss, outputs, batches)).backward()
            return {f"output {i}": o for i, o in enumerate(outputs)} | oracles.gradients(model)

        self.model.zero_grad()
        self.reference.check(self.model, act, f"training is PEFT's, with {change} and {meanwhile}")

    def interrupt(self, model: PeftModel, how: str) -> None:
        """Do something between a forward and its backward pass that changes neither."""
        if how in COPIES:
            COPIES[how](model)
        elif how == "reference pass":
            with model.disable_adapter():
                self.evaluated(model)
        elif how == "evaluation":
            self.evaluated(model.eval())
            model.train()

    def take_step(self, *, observes: bool = True) -> None:
        """Take the step that the gradients ask for, and check the event that may follow."""
        dynamic, earlier = self.dynamic, len(self.dynamic.history) if self.dynamic else 0
        if dynamic and observes:
            dynamic.observe()
            layers = lora_layers(self.model).items()
            self.reached |= {n for n, m in layers if m.lora_B["default"].weight.grad is not None}
        self.optimizer.step()
        if dynamic:
            dynamic.step()
            if self.model.active_adapter == "default":  # an adapter that is not trained is held
                for event in dynamic.history[earlier:]:
                    oracles.check_event(event, dynamic, self.reached)
        self.model.zero_grad()

    def train_on(self, batches: list[int], steps: int, **how: bool) -> None:
        for _ in range(steps):
            self.passes(batches, together=False)
            self.take_step(**how)

    @unmerged
    @rule(
        batches=st.lists(BATCHES, min_size=1, max_size=2),
        steps=st.integers(1, 10),
        observes=st.sampled_from([True, True, True, False]),
    )
    def train(self, batches, steps, observes) -> None:
        self.train_on(batches, steps, observes=observes)

    @plain
    @rule(batch=BATCHES, change=st.sampled_from([*AROUND, *LASTING]))
    def change_within_a_forward(self, batch, change) -> None:
        if change == "inputs in place" and self.settings.needs_inputs_kept:
            return
        if self.settings.checkpointing == "off" or change in AROUND:
            self.passes([batch], change=change)
            self.model.zero_grad()

    @plain
    @rule(
        batches=st.lists(BATCHES, min_size=1, max_size=3),
        meanwhile=st.sampled_from(["nothing", "evaluation", "reference pass", *COPIES]),
    )
    def several_forwards_then_one_backward(self, batches, meanwhile) -> None:
        self.passes(batches, meanwhile=meanwhile)
        self.take_step()

    @rule(how=st.sampled_from(["eval", "no_grad", "disable_adapter"]))
    def look(self, how) -> None:
        def act(model: PeftModel) -> Tensors:
            if how != "disable_adapter":
                return self.evaluated(model)
            with model.disable_adapter():
                return {"output": self.forward(model, 0)}

        if self.merged and self.settings.skips != "never":
            how = "eval"  # a forward that is disabled unmerges the layers that it comes to alone
        self.model.train(how == "no_grad")
        self.reference.check(self.model, act, f"outputs are PEFT's in a forward with {how}")
        self.model.train()

    @precondition(lambda self: self.settings.wiring == "Decoder")
    @rule(first=st.integers(0, 5))
    def generate(self, first) -> None:
        tokens = torch.arange(first, first + 3).expand(2, 3)

        def act(model: PeftModel) -> Tensors:
            model.get_base_model().skipped = frozenset()
            return {"output": model.eval().generate(tokens).double()}

        self.reference.check(self.model, act, "generated ids are PEFT's")
        self.model.train()

    # Adapters.

    @plain
    @rule()
    def add_or_delete_adapter(self) -> None:
        if "other" in self.model.peft_config:
            self.model.delete_adapter("other")
        else:
            add_other(self.model, self.settings)

    @unmerged
    @precondition(lambda self: "other" in self.model.peft_config and not self.settings.budget_end)
    @rule(name=st.sampled_from(["default", "other"]))
    def set_adapter(self, name) -> None:
        self.model.set_adapter(name)

    @rule()
    def merge_or_unmerge(self) -> None:
        (self.model.unmerge_adapter if self.merged else self.model.merge_adapter)()

    # Copies and files.

    @plain
    @rule(way=st.sampled_from(sorted(COPIES)), keep=st.booleans())
    def copy_the_model(self, way, keep) -> None:
        original, self.model = self.model, COPIES[way](self.model)
        self.passes([0])
        self.model.zero_grad()
        if keep:
            self.start(self.model)
        else:
            self.model = original

    @plain
    @rule(keep=st.booleans())
    def save_and_load(self, keep) -> None:
        base = self.settings.base()
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            with accepted_by_peft():
                loaded = PeftModel.from_pretrained(base, folder, is_trainable=keep)
        live = weights(self.model)
        for name, weight in weights(loaded).items():
            assert torch.equal(weight, live[name]), f"what is saved is what was trained: {name}"
        self.reference.check(loaded, self.evaluated, "a saved adapter computes what it did")
        if keep:
            self.start(loaded.train())

    @plain
    @attached
    @rule(batch=BATCHES, steps=st.integers(1, 8))
    def kill_and_resume(self, batch, steps) -> None:
        parts = self.dynamic, self.model, self.optimizer
        states = copy.deepcopy([part.state_dict() for part in parts])
        known = self.budget, self.config, set(self.reached)
        self.train_on([batch], steps)

        with accepted_by_peft():
            fresh = get_peft_model(self.settings.base(), copy.deepcopy(self.config)).train()
        if "other" in self.model.peft_config:
            add_other(fresh, self.settings)
        self.start(fresh)
        self.budget, self.config, self.reached = known
        for part, state in zip((self.dynamic, fresh, self.optimizer), states, strict=True):
            part.load_state_dict(state)
        self.train_on([batch], steps)

        assert self.dynamic.history == parts[0].history, "a resumed run has the same events"
        whole = weights(parts[1])
        for name, weight in weights(fresh).items():
            assert torch.equal(weight, whole[name]), f"a resumed run has the same weights: {name}"

    # The controller.

    @plain
    @attached
    @rule(plan=PLANS)
    def apply(self, plan) -> None:
        names, before = self.settings.names, self.dynamic.ranks
        plan = {names[i % len(names)]: rank for i, rank in plan.items()}
        after = before | plan
        outputs = self.evaluated(self.model.eval())["output"]
        if parameters(self.model, after) > self.dynamic.budget:
            with pytest.raises(BudgetError):
                self.dynamic.apply(RankPlan(step=0, ranks=plan))
            after = before
        else:
            self.dynamic.apply(RankPlan(step=0, ranks=plan))
        assert self.dynamic.ranks == after, f"{plan} within the budget is what is applied"
        if all(after[name] >= before[name] for name in names):
            change = (self.evaluated(self.model)["output"] - outputs).abs().max()
            allowed = self.settings.accuracy * outputs.abs().max()
            assert change <= allowed, f"growing changes no output: {change:.2g}"
        self.model.train()

    @attached
    @rule(how=st.sampled_from(["freeze", "close"]))
    def stop(self, how) -> None:
        if how == "freeze":
            self.dynamic.freeze()
        else:
            self.dynamic.close()
            self.dynamic = None
            oracles.check_let_go(self.hooks(), self.hooks_before)

    @plain
    @rule()
    def attach_again(self) -> None:
        self.attach()

    @invariant()
    def keeps_its_promises(self) -> None:
        if not hasattr(self, "settings"):
            return  # before `begin`
        oracles.check_one_truth(self.model, self.optimizer, self.scalings, self.held)
        if self.dynamic:
            oracles.check_budget(self.dynamic, self.model, self.budget)
        if self.settings.probes:
            self.look("eval")
            if not self.merged:
                self.passes([0])
                self.model.zero_grad()


def run(number: int, sequences: int) -> None:
    """Run sequences, the same ones each time for the same number."""
    machine = seed(number)(type("Sequence", (Sequence,), {}))
    limits = settings(
        max_examples=sequences,
        stateful_step_count=25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=limits)


@pytest.fixture(autouse=True)
def quiet():
    """Keep warnings that are logged in every sequence out of a failure's report."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(1200)  # a failure takes minutes to be made small
def test_random_sequences_keep_every_promise():
    run(0, sequences=50)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(1, 11))
def test_a_thousand_random_sequences_keep_every_promise(number):
    run(number, sequences=1000)
