"""A budget that falls: train wide, finish small."""

import copy

import pytest
import torch

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.errors import BudgetError, ConfigError
from tests.lora_layers import layers_of, lora_chain
from tests.models import adamw, attached, lora_llama, train

STEPS = 40


@pytest.mark.parametrize("importance", ["signal", "uniform"])
def test_the_budget_falls_in_equal_ratios_and_no_step_exceeds_it(importance):
    model = lora_llama(r=8)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, importance=importance, total_steps=STEPS, budget_end=0.25)
    costs = {layer.name: layer.cost for layer in dynamic._layers}
    start = 8 * sum(costs.values())
    seen = []

    def count(step):
        spent = sum(costs[name] * rank for name, rank in dynamic.ranks.items())
        assert spent == dynamic.parameters <= dynamic.budget
        seen.append(dynamic.budget)

    train(model, optimizer, dynamic, STEPS, after=count)
    steps = [event.step for event in dynamic.history]
    assert len(steps) == 5
    budgets = [seen[step - 1] for step in steps]
    assert budgets == [round(start / 4 ** (passed / 5)) for passed in range(1, 6)]
    assert seen[0] == dynamic.peak_parameters == start
    assert seen[-1] - dynamic.parameters < min(costs.values())
    lost = [layer.output_lost for event in dynamic.history for layer in event.layers.values()]
    assert 0 < max(lost) < 1


def test_a_cut_keeps_the_directions_that_carry_output():
    """Layer "1" needs all of its four ranks; the columns of the others are multiples of one."""
    model = lora_chain(8, 10, 6, 12, r=4)
    for layer in layers_of(model):
        if layer.name != "1":
            layer.lora_B.data = layer.lora_B[:, :1] * torch.tensor([1.0, -2.0, 0.5, 3.0])
    optimizer = adamw(model, lr=0.0)
    dynamic = attached(
        model, optimizer, importance="uniform", total_steps=1, events=1, budget_end=0.5
    )
    inputs = torch.randn(64, 8, dtype=torch.float64)
    before = model(inputs)
    before.square().mean().backward()
    dynamic.observe()
    optimizer.step()
    dynamic.step()
    assert dynamic.ranks == {"0": 1, "1": 4, "2": 1}
    assert max(layer.output_lost for layer in dynamic.history[0].layers.values()) < 1e-6
    torch.testing.assert_close(model(inputs), before)


def test_weights_put_back_from_before_a_cut_have_the_budget_of_then_and_are_cut_again():
    model = lora_llama(r=8)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=STEPS, budget_end=0.25)
    train(model, optimizer, dynamic, 2)
    state, weights, budget = dynamic.state_dict(), copy.deepcopy(model.state_dict()), dynamic.budget
    train(model, optimizer, dynamic, 14)
    dynamic.take_shapes(state)
    model.load_state_dict(weights)
    assert dynamic.parameters == dynamic.budget == budget
    train(model, optimizer, dynamic, STEPS - 16)
    assert dynamic.parameters <= dynamic.budget == budget // 4


def test_pinned_layers_and_the_lowest_rank_hold_at_every_cut():
    model = lora_llama(r=8)
    optimizer = adamw(model)
    bounds = {"pinned": ("*.0.*q_proj",), "min_rank": 2}
    dynamic = attached(
        model, optimizer, importance="random", total_steps=STEPS, budget_end=0.4, **bounds
    )
    train(model, optimizer, dynamic, STEPS)
    (pinned,) = [rank for name, rank in dynamic.ranks.items() if ".0." in name and "q_" in name]
    assert pinned == 8
    assert min(dynamic.ranks.values()) == 2


def test_a_last_budget_below_the_lowest_ranks_is_refused_before_training(tiny_llama):
    config = DynamicLoraConfig(total_steps=STEPS, min_rank=3, budget_end=0.5)
    with pytest.raises(BudgetError, match=r"got 0.5, which leaves \d+: raise it to 0.75 or more"):
        DynamicLora(tiny_llama, adamw(tiny_llama), config)


def test_a_run_of_unknown_length_cannot_plan_its_cuts(tiny_llama):
    with pytest.raises(ConfigError, match="`total_steps` must be known"):
        DynamicLora(tiny_llama, adamw(tiny_llama), DynamicLoraConfig(budget_end=0.5))
