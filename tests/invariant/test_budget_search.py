"""`budget_end="auto"`: the run ends at the fewest parameters that keep the validation loss."""

import copy
import math

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.budget_search import BudgetSearch, falling_budgets
from dynlora.errors import ConfigError, NonFiniteError
from tests.lora_layers import layers_of, lora_chain
from tests.models import adamw

STEPS, NEEDED = 200, 2


class Learner:
    """A chain of layers that learns a change of rank 2 in one of them."""

    def __init__(self, *, r=8, shard=None, **config):
        self.model = lora_chain(16, 16, 16, r=r)
        for layer in layers_of(self.model):
            layer.lora_B.data.zero_()
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(512, 16, generator=generator, dtype=torch.float64)
        teacher = copy.deepcopy(self.model)
        change = torch.randn(16, NEEDED, generator=generator, dtype=torch.float64)
        weight = layers_of(teacher)[0].module.base_layer.weight
        weight.data += change @ change.T / 8
        with torch.no_grad():
            self.targets = teacher(self.inputs)
        settings = DynamicLoraConfig(total_steps=STEPS, budget_end="auto", **config)
        if shard is not None:
            shard(self.model)
        self.optimizer = adamw(self.model, lr=0.005)
        self.dynamic = DynamicLora(
            self.model,
            self.optimizer,
            settings,
            validate=lambda: self.loss(slice(256, 512)).item(),
        )

    def loss(self, rows):
        return nn.functional.mse_loss(self.model(self.inputs[rows]), self.targets[rows])

    def train(self, first, last):
        generator = torch.Generator().manual_seed(first)
        for _ in range(first, last):
            self.loss(torch.randint(256, (64,), generator=generator)).backward()
            self.dynamic.observe()
            self.optimizer.step()
            self.dynamic.step()
            self.optimizer.zero_grad()
            live = sum(layer.r * layer.cost for layer in self.dynamic._layers)
            assert live == self.dynamic.parameters <= self.dynamic.budget


def test_a_run_ends_at_a_fraction_of_its_ceiling_with_the_loss_of_the_ceiling():
    learner, wide = Learner(), Learner(budget_tolerance=0.0)
    start = learner.loss(slice(256, 512)).item()
    learner.train(0, STEPS)
    wide.train(0, STEPS)
    assert learner.dynamic.parameters <= learner.dynamic._first_budget / 2
    assert learner.dynamic.ranks["0"] >= NEEDED
    reached, best = (x.loss(slice(256, 512)).item() for x in (learner, wide))
    assert reached - best <= 0.01 * (start - best)


def test_a_sharded_model_finds_what_a_whole_one_finds():
    """FSDP2 keeps the gathered weights of its root after a forward without a backward pass."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = Learner(shard=lambda model: fully_shard(model, mesh=mesh))
        sharded.train(0, STEPS)
    finally:
        distributed.destroy_process_group()
    whole = Learner()
    whole.train(0, STEPS)
    assert sharded.dynamic.ranks == whole.dynamic.ranks
    assert sharded.loss(slice(0, 256)).item() == pytest.approx(whole.loss(slice(0, 256)).item())


def test_a_tried_cut_leaves_no_trace():
    learner = Learner()
    learner.train(0, 40)
    adapters, features = learner.dynamic._adapters, learner.dynamic._analyzer.stats()
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    ranks = dict.fromkeys(learner.dynamic.ranks, 1)
    full = learner.loss(slice(256, 512)).item()
    with adapters.cut(ranks, features):
        cut = learner.loss(slice(256, 512)).item()
        products = [layer.lora_B @ layer.lora_A for layer in learner.dynamic._layers]
    assert cut > full
    assert [int(torch.linalg.matrix_rank(product)) for product in products] == [1, 1]
    after = learner.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert sum(learner.dynamic.ranks.values()) == 16


def test_a_resumed_search_continues_bit_for_bit():
    whole, killed = Learner(), Learner()
    for learner in (whole, killed):
        learner.train(0, 120)
    resumed = Learner()
    resumed.dynamic.load_state_dict(killed.dynamic.state_dict())
    resumed.model.load_state_dict(killed.model.state_dict())
    resumed.optimizer.load_state_dict(killed.optimizer.state_dict())
    for learner in (whole, resumed):
        learner.train(120, STEPS)
    assert resumed.dynamic.history == whole.dynamic.history
    assert resumed.dynamic.lost_by_search == whole.dynamic.lost_by_search
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_need_is_told_only_of_ranks_that_the_search_has_cut():
    learner = Learner()
    learner.train(0, 40)
    early = learner.dynamic.state_dict()
    assert learner.dynamic.lost_by_search is None
    learner.train(40, STEPS)
    assert isinstance(learner.dynamic.lost_by_search, float)
    learner.dynamic.take_shapes(early)  # as of the best checkpoint
    assert learner.dynamic.lost_by_search is None


def test_the_smallest_budget_within_the_tolerance_is_found():
    losses = {64: 1.0, 45: 1.0, 31: 1.02, 21: 1.05, 14: 1.2, 9: 1.5, 8: 2.0}
    tried = []

    class Cut:
        def __init__(self, budget):
            tried.append(budget)

        def __enter__(self):
            return None

        def __exit__(self, *_):
            return None

    def loss():
        return losses[tried[-1]] if tried else 1.0

    search = BudgetSearch(nn.Linear(1, 1), loss, tolerance=0.01, device=torch.device("cpu"))
    search.start_loss = 6.0  # so that 0.05 may be lost
    assert falling_budgets(64, 8) == list(losses)
    assert search.smallest(list(losses), Cut) == 21
    assert search.lost == pytest.approx(0.05 / 5)
    assert len(tried) <= 3


def test_validation_is_in_eval_mode_and_changes_neither_modes_nor_random_state():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model[1].eval()
    seen = []

    def validate():
        seen.append((model.training, torch.is_grad_enabled()))
        model.train()  # as many do after an evaluation
        return float(torch.rand(())) * 0 + 3.0

    search = BudgetSearch(model, validate, tolerance=0.1, device=torch.device("cpu"))
    state = torch.get_rng_state()
    assert search.loss() == 3.0
    assert seen == [(False, False)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_search_without_a_validation_loss_is_refused():
    model = lora_chain(8, 8)
    with pytest.raises(ConfigError, match="needs `validate`"):
        DynamicLora(model, adamw(model), DynamicLoraConfig(total_steps=9, budget_end="auto"))
    search = BudgetSearch(model, lambda: math.nan, tolerance=0.1, device=torch.device("cpu"))
    with pytest.raises(NonFiniteError, match="must return a finite loss, got nan"):
        search.loss()
