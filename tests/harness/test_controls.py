"""Each control arm changes exactly the part of the method in its description."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from benchmarks.last_blocks.allocations import CHOICES, allocate
from benchmarks.recovery.arms import (
    FOLLOWING,
    Plan,
    Setting,
    grown_directions,
    layer_costs,
    make_plan,
    permute_layers,
    refresh,
    schedule_of,
    train,
)
from benchmarks.recovery.student import Split, Texts
from benchmarks.resumable.appended import AppendedTable
from benchmarks.resumable.search import next_trial
from tests.models import bare_bert

R, STEPS, SEED = 2, 40, 3
SETTING = Setting(r=R, learning_rate=0.02, scale=0.5, seed=SEED, steps=STEPS)


@pytest.fixture(scope="module")
def task():
    """Return a task in the shape of `Recovery`: texts of a tiny model and vectors to learn."""
    generator = torch.Generator().manual_seed(0)
    texts = Texts(
        torch.randint(1, 64, (400, 12), generator=generator),
        torch.randint(4, 13, (400,), generator=generator),
    )
    base = bare_bert(layers=2)
    mixing = torch.randn(48, 48, generator=generator)
    with torch.no_grad():
        targets = base(input_ids=texts.ids).last_hidden_state.mean(dim=1) @ mixing
    return SimpleNamespace(
        base=base,
        splits={"train": Split(texts, targets)},
        student=lambda: bare_bert(layers=2),
    )


@pytest.fixture(scope="module")
def dynamic(task):
    """Return the trained arm `dynamic`."""
    return train(task, Plan(config={}), SETTING)


@pytest.fixture(scope="module")
def reference(dynamic):
    """Return the ranks after each event of the arm `dynamic`."""
    found = schedule_of(dynamic.dynamic)
    assert len({*found[max(found)].values()}) > 1  # ranks moved
    return found


def arm(task, name, reference=None):
    """Return a plan and the trained arm."""
    plan = make_plan(name, layer_costs(task.base), R, seed=SEED, reference=reference)
    return plan, train(task, plan, SETTING).dynamic


def test_lora_keeps_one_rank_and_one_scale(task):
    _, found = arm(task, "lora")
    assert {*found.ranks.values()} == {R}
    assert {layer.scaling for layer in found._layers} == {SETTING.scale}
    assert found.history == []


@pytest.mark.parametrize("name", ["falling", "falling_held"])
def test_a_falling_budget_begins_at_four_times_the_rank_and_ends_at_its_cost(task, name):
    _, found = arm(task, name)
    at_r = R * sum(layer_costs(task.base).values())
    assert found.peak_parameters == 4 * at_r
    assert 0.95 * at_r < found.parameters <= found.budget == at_r
    assert {layer.scaling for layer in found._layers} == {SETTING.scale}


def test_random_moves_other_ranks_than_the_default(task, reference):
    _, found = arm(task, "random")
    assert found.ranks != dict.fromkeys(found.ranks, R)
    assert found.ranks != reference[max(reference)]


def test_replaying_the_reference_without_a_permutation_repeats_its_run(task, dynamic, reference):
    replayed = train(task, Plan(config=FOLLOWING, schedule=reference), SETTING)
    pairs = zip(dynamic.model.parameters(), replayed.model.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_permuted_keeps_ranks_and_budget_but_no_layer(task, reference):
    costs, source = layer_costs(task.base), permute_layers(layer_costs(task.base), SEED)
    assert sorted(source.values()) == sorted(costs)
    assert all(source[name] != name and costs[source[name]] == costs[name] for name in costs)
    _, found = arm(task, "permuted", reference)
    for step, ranks in schedule_of(found).items():
        wanted = reference[step]
        assert ranks == {name: wanted[source[name]] for name in costs}
        assert Counter(ranks.values()) == Counter(wanted.values())
        assert sum(ranks[n] * costs[n] for n in costs) == sum(wanted[n] * costs[n] for n in costs)


def test_refresh_replaces_directions_and_keeps_ranks(task, reference):
    plan, found = arm(task, "refresh", reference)
    assert plan.refreshed == grown_directions(reference, dict.fromkeys(found.ranks, R))
    assert {*found.ranks.values()} == {R}
    assert found.peak_parameters == found.budget
    before = {layer.name: layer.lora_A.clone() for layer in found._layers}
    assert refresh(found, 5, step=STEPS, seed=SEED) == 5
    assert {*found.ranks.values()} == {R}
    changed = sum(not torch.equal(before[layer.name], layer.lora_A) for layer in found._layers)
    assert changed == 5


def test_pace_spreads_the_learning_rate_as_the_reference_spreads_its_budget(task, reference):
    plan, found = arm(task, "pace", reference)
    costs, final = layer_costs(task.base), reference[max(reference)]
    assert {*found.ranks.values()} == {R}
    assert {layer.scaling for layer in found._layers} == {SETTING.scale}
    spent = sum(costs[name] * final[name] for name in costs)
    assert sum(costs[name] * R * plan.rates[name] for name in costs) == pytest.approx(spent)
    assert found.budget - spent < min(costs.values())


@pytest.mark.parametrize(("name", "power"), [("pattern", 0), ("pattern_slow", 1)])
def test_patterns_have_the_final_ranks_and_their_scale(task, reference, name, power):
    _, found = arm(task, name, reference)
    assert found.ranks == reference[max(reference)]
    for layer in found._layers:
        assert layer.scaling == pytest.approx(SETTING.scale * (R / layer.r) ** power)


def test_the_rule_spends_the_budget_of_queries_and_keys_on_one_layer(task):
    _, found = arm(task, "rule")
    others = {name: rank for name, rank in found.ranks.items() if rank != R}
    assert sum(rank == 1 for rank in others.values()) == 4
    assert [name for name, rank in others.items() if rank > R] == ["encoder.layer.1.output.dense"]
    assert 0 <= found.budget - found.parameters < 240  # the layer's parameters per rank


def test_a_search_ends_when_no_neighbour_of_the_best_pair_is_missing():
    first, ended = [[0.02, 0.25], [0.04, 0.25]], {}
    while (pair := next_trial(first, ended, most=20, moving=2)) is not None:
        ended[pair] = abs(pair[0] - 0.01) + abs(pair[1] - 0.25)
    assert min(ended, key=ended.get) == (0.01, 0.25)
    assert {(0.005, 0.25), (0.02, 0.25), (0.01, 0.125), (0.01, 0.5)} < ended.keys()
    assert next_trial(first, {(0.02, 0.25): 1.0, (0.04, 0.25): 2.0}, most=2, moving=2) is None


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    path, columns = tmp_path / "rows.csv", ["seed", "name", "ranks"]
    whole = {"seed": 1, "name": "two, words", "ranks": {'a, "b"': 2}}
    AppendedTable(path, columns).append(whole)
    with path.open("a") as file:
        file.write("2,{un")
    table = AppendedTable(path, columns)
    table.append({"seed": 3, "name": "1e5"})
    found = AppendedTable(path, columns).rows
    assert found == [whole, {"seed": 3, "name": "1e5", "ranks": None}]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_fixed_allocation_has_the_parameters_of_uniform_ranks(choice):
    sizes = {"self_attn.q_proj": 12, "self_attn.o_proj": 16, "mlp.up_proj": 40, "mlp.down_proj": 44}
    costs = {f"layers.{block}.{name}": cost for block in range(4) for name, cost in sizes.items()}
    ranks = allocate(choice, costs, R)
    free = R * sum(costs.values()) - sum(costs[name] * rank for name, rank in ranks.items())
    assert 0 <= free < max(costs[name] for name in ranks)
    assert max(ranks.values()) - min(ranks.values()) <= 1
    assert (len(ranks) == len(costs)) == (choice == "uniform")
