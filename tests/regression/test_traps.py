"""Mistakes that other projects have paid for; the number of the issue is in the test's name."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from dynlora import DynamicLora, DynamicLoraConfig, RankPlan
from dynlora.adjuster import LayerBounds, plan_ranks
from dynlora.errors import BudgetError
from tests.models import adamw, attached, bare_llama, lora_llama, loss_of, sequences, train, trained


def test_issue_peft_1801_a_lower_rank_is_a_smaller_tensor_not_a_mask(tiny_llama, tmp_path):
    dynamic = attached(tiny_llama, adamw(tiny_llama), total_steps=100)
    name = next(iter(dynamic.ranks))
    dynamic.apply(RankPlan(step=0, ranks={name: 1}))
    layer = tiny_llama.base_model.model.get_submodule(name)
    assert layer.lora_A["default"].weight.shape[0] == 1
    assert layer.r["default"] == 1
    tiny_llama.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == {f"^({re.escape(name)})$": 1}


@pytest.mark.parametrize("held", [1, 8])
def test_issue_peft_2337_a_budget_equal_to_what_is_spent_is_no_error(held):
    layers = {n: LayerBounds(cost=64, floor=1, ceiling=16, held=held) for n in "abc"}
    shares = dict.fromkeys("abc", 1 / 3)
    assert plan_ranks(shares, layers, budget=3 * 64 * held) == dict.fromkeys("abc", held)


def test_issue_peft_1539_no_plan_ever_holds_rank_zero(tiny_llama):
    layers = {n: LayerBounds(cost=64, floor=1, ceiling=16, held=8) for n in "abc"}
    assert min(plan_ranks({"a": 1.0, "b": 0.0, "c": 0.0}, layers, budget=1000).values()) == 1
    dynamic = attached(tiny_llama, adamw(tiny_llama), total_steps=100)
    name = next(iter(dynamic.ranks))
    with pytest.raises(BudgetError, match="must be a whole number of at least 1, got 0"):
        dynamic.apply(RankPlan(step=0, ranks={name: 0}))


def test_issue_peft_3373_injected_adapters_without_a_wrapper_move_too():
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    model = inject_adapter_in_model(config, bare_llama())
    _, dynamic = trained(model, 20, importance="random", total_steps=20, hysteresis=0)
    assert len(set(dynamic.ranks.values())) > 1
    assert model.peft_config["default"].rank_pattern


def test_gradients_are_read_before_they_are_cleared_and_ranks_move_only_in_step(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = attached(
        tiny_llama, optimizer, importance="random", total_steps=2, last_event=1.0, hysteresis=0
    )
    batches = sequences()
    for _ in range(2):
        loss_of(tiny_llama, next(batches)).backward()
        before = dynamic.ranks
        dynamic.observe()
        optimizer.step()
        assert dynamic.ranks == before
        dynamic.step()
        optimizer.zero_grad()
    assert dynamic.history


def test_train_and_eval_only_switch_the_mode_and_ranks_are_exported_without_a_logger(
    tiny_llama, tmp_path
):
    _, dynamic = trained(tiny_llama, 20, importance="random", total_steps=20, hysteresis=0)
    before = {k: v.clone() for k, v in tiny_llama.state_dict().items()}
    assert tiny_llama.eval() is tiny_llama
    assert tiny_llama.train() is tiny_llama
    after = tiny_llama.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(layer.module.merged for layer in dynamic._layers)
    tiny_llama.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare_llama(), tmp_path)
    for name, rank in dynamic.ranks.items():
        assert loaded.base_model.model.get_submodule(name).r["default"] == rank
    assert len(set(dynamic.ranks.values())) > 1


def test_an_adapter_called_e_does_not_match_every_parameter_name():
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(bare_llama(), config, adapter_name="e")
    model.add_adapter("lora_A", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    dynamic = DynamicLora(model, adamw(model), DynamicLoraConfig(), adapter_name="e")
    other = {n: p.shape for n, p in model.named_parameters() if ".lora_A.lora_A." in n}
    dynamic.apply(RankPlan(step=0, ranks=dict.fromkeys(dynamic.ranks, 2)))
    assert len(dynamic.ranks) == 4
    assert other
    assert all(model.get_parameter(n).shape == shape for n, shape in other.items())
    assert model.peft_config["lora_A"].rank_pattern == {}


def test_issue_veloxquant_mlx_31_the_default_configuration_adapts():
    model = lora_llama(r=8)
    optimizer = adamw(model)
    dynamic = DynamicLora(model, optimizer, DynamicLoraConfig(total_steps=200))
    train(model, optimizer, dynamic, 60)
    assert len(set(dynamic.ranks.values())) > 1


class Similar(nn.Module):
    """Names that a careless regular expression confuses: `fc` ends both, and the dot matches x."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.blockxfc = nn.Linear(8, 8)

    def forward(self, x):
        return self.blockxfc(self.block["fc"](self.fc(x)))


def test_rank_pattern_keys_match_their_own_layer_only(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(Similar(), LoraConfig(r=4, target_modules=["fc", "blockxfc"]))
    dynamic = attached(model, adamw(model), total_steps=100)
    plan = {"fc": 2, "block.fc": 3, "blockxfc": 4}
    dynamic.apply(RankPlan(step=0, ranks=plan))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Similar(), tmp_path)
    for name, rank in plan.items():
        assert loaded.base_model.model.get_submodule(name).r["default"] == rank


def test_a_loss_kept_alive_over_an_event_does_not_break_the_next_backward(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = attached(tiny_llama, optimizer, importance="random", total_steps=40, hysteresis=0)
    batches, kept = sequences(), []
    for _ in range(40):
        loss = loss_of(tiny_llama, next(batches))
        kept.append(loss)
        loss.backward(retain_graph=True)
        dynamic.observe()
        optimizer.step()
        dynamic.step()
        optimizer.zero_grad()
    assert len(set(dynamic.ranks.values())) > 1


def test_no_direction_dies_when_a_shrink_follows_a_grow(tiny_llama):
    optimizer, dynamic = trained(tiny_llama, 5, importance="uniform", total_steps=10_000)
    for rank in (2, 4, 3):  # shrink, grow, and shrink right away: one direction is still fresh
        dynamic.apply(RankPlan(step=5, ranks=dict.fromkeys(dynamic.ranks, rank)))
    train(tiny_llama, optimizer, dynamic, 2)
    for layer in dynamic._layers:
        assert layer.lora_A.any(dim=1).all()
        assert layer.lora_B.any(dim=0).all()
