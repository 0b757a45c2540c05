"""`DistributedDataParallel` over events in one process, and names on which processes agree."""

import copy
import gc
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dynlora.distributed import names_on_all
from dynlora.errors import EngineError
from dynlora.types import RankPlan
from tests.models import adamw, attached, lora_llama, loss_of, sequences

STEPS = 6
RANKS = {2: (1, 4), 4: (6, 2)}
"""Ranks of every other layer, and of the rest, after a step."""


@pytest.fixture(scope="module", autouse=True)
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # a reducer that outlives its group may wait forever
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def bare(group):
    run = Run()
    run.train(0, STEPS)
    assert set(run.dynamic.ranks.values()) == {2, 6}
    return run


def reduce_and_count(sent, bucket):
    """Reduce a bucket as torch does, and count its elements."""
    sent[-1] += bucket.buffer().numel()
    return allreduce_hook(None, bucket)


class Run:
    """A model in training, and its numbers of elements per step."""

    def __init__(self, *, attaches_last=False, **options):
        """Wrap the model if there are options."""
        self.model = self.called = lora_llama()
        self.optimizer = adamw(self.model)
        self.live, self.held, self.sent = [], [], []
        if not attaches_last:
            self.dynamic = attached(self.model, self.optimizer, importance="uniform")
        if options:
            self.called = DistributedDataParallel(self.model, **options)
            self.called.register_comm_hook(self.sent, reduce_and_count)
        if attaches_last:
            self.dynamic = attached(self.called, self.optimizer, importance="uniform")

    def train(self, first, last, *, parts=2):
        """Accumulate gradients of the parts of each batch; the last graph stays alive."""
        batches = sequences()
        for step, tokens in zip(range(1, last + 1), batches, strict=False):
            if step <= first:
                continue
            self.sent.append(0)
            for place, rows in enumerate(tokens.chunk(parts), 1):
                wrapped = self.called is not self.model
                with self.called.no_sync() if wrapped and place < parts else nullcontext():
                    loss = loss_of(self.called, rows) / parts
                    loss.backward()
            self.dynamic.observe()
            self.optimizer.step()
            self.count()
            self.dynamic.step()
            if step in RANKS:
                self.resize(*RANKS[step])
            self.optimizer.zero_grad()
        assert loss.grad_fn is not None

    def resize(self, *ranks):
        """Set the ranks of every other layer, and of the rest."""
        plan = dict(zip(self.dynamic.ranks, itertools.cycle(ranks), strict=False))
        self.dynamic.apply(RankPlan(step=0, ranks=plan))

    def count(self):
        """Count live parameters, and the elements of all that is held for them."""
        self.live.append(self.dynamic.parameters)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        moments = [self.optimizer.state[p][k] for p in trained for k in ("exp_avg", "exp_avg_sq")]
        tensors = [*trained, *(p.grad for p in trained), *moments]
        self.held.append(sum(tensor.numel() for tensor in tensors))


def check_equal(run, bare):
    """Check that a run equals the one without a wrapper bit for bit."""
    assert run.dynamic.ranks == bare.dynamic.ranks
    theirs = bare.model.state_dict()
    assert all(torch.equal(ours, theirs[name]) for name, ours in run.model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"bucket_cap_mb": 0.01},
        {"attaches_last": True, "gradient_as_bucket_view": True},
        {"attaches_last": True, "find_unused_parameters": True},
    ],
)
def test_a_step_holds_and_reduces_the_live_parameters_and_equals_that_of_the_bare_model(
    options, bare
):
    run = Run(**options)
    run.train(0, STEPS)
    check_equal(run, bare)
    assert run.sent == run.live
    assert run.held == [4 * live for live in run.live]
    plain = sum(p.numel() for p in lora_llama().parameters() if p.requires_grad)
    assert max(run.live) <= plain


def test_a_hook_that_keeps_tensors_per_bucket_is_refused_in_the_first_step():
    run = Run(bucket_cap_mb=0.01)
    run.called._comm_hooks = [(powerSGD_hook, PowerSGDState(None, start_powerSGD_iter=3))]
    with pytest.raises(EngineError, match=r"got PowerSGD\. Use another hook"):
        run.train(0, 1)


def test_a_static_graph_stays_static():
    """Without gradient accumulation, which torch does not support there."""
    run, bare = Run(static_graph=True), Run()
    for one in (run, bare):
        one.train(0, STEPS, parts=1)
    check_equal(run, bare)
    assert run.sent == run.live
    assert run.called._get_ddp_logging_data()["static_graph"]


def test_a_resized_model_is_reduced_after_an_evaluation_and_the_controllers_end():
    run = Run(bucket_cap_mb=0.01)
    run.train(0, 3)
    run.resize(1, 2)
    live = run.dynamic.parameters
    run.dynamic.close()
    run.dynamic = None
    with torch.inference_mode():
        run.called(next(sequences()))
    run.sent.append(0)
    for _ in range(2):
        loss_of(run.called, next(sequences())).backward()
    assert run.sent[-1] == 2 * live
    assert not run.model._forward_pre_hooks


def test_ranks_of_a_checkpoint_are_reduced_by_the_wrapper_that_trained_others(bare):
    run = Run(bucket_cap_mb=0.01)
    run.train(0, 3)
    parts = (run.dynamic, run.model, run.optimizer)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    run.train(3, STEPS)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    run.train(3, STEPS)
    check_equal(run, bare)
    assert run.sent == run.live


NAMES = ["a", "b", "c", "d"]


def test_a_name_counts_only_where_every_process_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def summed(values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor([name in {"b", "c"} for name in NAMES]).to(values)

    cpu = torch.device("cpu")
    assert names_on_all({"a", "c"}, NAMES, cpu) == {"a", "c"}
    monkeypatch.setattr("dynlora.distributed.process_count", lambda: 2)
    monkeypatch.setattr("dynlora.distributed.sum_over_processes", summed)
    assert names_on_all({"a", "c"}, NAMES, cpu) == {"c"}
    assert names_on_all(set(), NAMES, cpu) == set()
