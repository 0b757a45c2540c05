"""Rank plans over their whole domain: bounds, budget, order, ties, and steadiness under noise."""

import math
import time
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynlora.adjuster import LayerBounds, bound_layer, plan_ranks, settle_ranks
from dynlora.errors import BudgetError

many = settings(deadline=None, max_examples=200, derandomize=True)


@st.composite
def bounds(draw, max_cost=40):
    floor = draw(st.integers(1, 6))
    ceiling = draw(st.integers(floor, 14))
    held = draw(st.integers(1, 16))
    return LayerBounds(cost=draw(st.integers(1, max_cost)), floor=floor, ceiling=ceiling, held=held)


SHARES = st.one_of(st.just(0.0), st.floats(0, 1), st.sampled_from([0.25, 0.5]))
LAYERS = st.dictionaries(st.text(max_size=3), bounds(), min_size=1, max_size=8)


@st.composite
def problems(draw, layers=LAYERS):
    """Draw shares, layers, a budget from the floors to above the ceilings, and a hysteresis."""
    drawn = draw(layers)
    low = sum(layer.cost * layer.floor for layer in drawn.values())
    high = sum(layer.cost * layer.ceiling for layer in drawn.values())
    return {
        "shares": {name: draw(SHARES) for name in drawn},
        "layers": drawn,
        "budget": draw(st.integers(low, high + 20)),
        "hysteresis": draw(st.sampled_from([0.0, 0.25, 3.0])),
    }


def cost_of(ranks, layers):
    return sum(layers[name].cost * rank for name, rank in ranks.items())


@many
@given(problems())
def test_every_rank_lies_within_its_bounds_and_the_cost_within_the_budget(problem):
    ranks, layers = plan_ranks(**problem), problem["layers"]
    assert ranks.keys() == layers.keys()
    assert all(layers[n].floor <= rank <= layers[n].ceiling for n, rank in ranks.items())
    assert cost_of(ranks, layers) <= problem["budget"]


@many
@given(problems())
def test_less_than_one_rank_of_the_cheapest_growable_layer_is_left(problem):
    ranks, layers = plan_ranks(**problem), problem["layers"]
    growable = [layers[n].cost for n, rank in ranks.items() if rank < layers[n].ceiling]
    if growable:
        assert problem["budget"] - cost_of(ranks, layers) < min(growable)


@many
@given(problems(), st.integers(1, 50))
def test_a_larger_budget_never_spends_less(problem, more):
    layers = problem["layers"]
    spent = cost_of(plan_ranks(**problem), layers)
    richer = problem | {"budget": problem["budget"] + more}
    assert cost_of(plan_ranks(**richer), layers) >= spent


@many
@given(problems())
def test_the_order_of_layers_changes_nothing(problem):
    turned = problem | {
        "shares": dict(sorted(problem["shares"].items(), reverse=True)),
        "layers": dict(reversed(list(problem["layers"].items()))),
    }
    assert plan_ranks(**turned) == plan_ranks(**problem)


@st.composite
def equal_cost_layers(draw):
    cost = draw(st.integers(1, 9))
    layers = draw(LAYERS)
    return {
        name: LayerBounds(cost=cost, floor=b.floor, ceiling=b.ceiling, held=b.held)
        for name, b in layers.items()
    }


@many
@given(problems(equal_cost_layers()))
def test_at_equal_costs_the_plan_takes_the_most_valuable_ranks(problem):
    layers = problem["layers"]
    cost = next(iter(layers.values())).cost

    def worth(name, rank):
        value = problem["shares"][name] / cost / (rank - 0.5)
        return value * (1 + problem["hysteresis"]) if rank <= layers[name].held else value

    wanted = [
        (-worth(name, rank), rank, name)
        for name, layer in layers.items()
        for rank in range(layer.floor + 1, layer.ceiling + 1)
    ]
    free = problem["budget"] // cost - sum(layer.floor for layer in layers.values())
    expected = {name: layer.floor for name, layer in layers.items()}
    for _, _, name in sorted(wanted)[:free]:
        expected[name] += 1
    assert plan_ranks(**problem) == expected


@many
@given(problems(), st.data())
def test_ranks_once_planned_stay_for_share_noise_below_the_hysteresis(problem, data):
    assume(all(share == 0 or share > 1e-300 for share in problem["shares"].values()))
    shares, layers, budget = problem["shares"], problem["layers"], problem["budget"]
    ranks = plan_ranks(shares, layers, budget=budget)
    held = {
        name: LayerBounds(cost=b.cost, floor=b.floor, ceiling=b.ceiling, held=ranks[name])
        for name, b in layers.items()
    }
    noise = st.floats(-0.11, 0.11)  # 1.11 / 0.89 is just below 1.25
    shaken = {name: share * (1 + data.draw(noise)) for name, share in shares.items()}
    assert plan_ranks(shaken, held, budget=budget, hysteresis=0.25) == ranks


@many
@given(problems())
def test_a_layer_without_room_keeps_its_rank(problem):
    layers = problem["layers"]
    pinned = sorted(layers)[0]
    held = layers[pinned].held
    fixed = bound_layer(
        cost=layers[pinned].cost, held=held, widest=20, min_rank=1, max_rank=1000, pinned=True
    )
    layers = layers | {pinned: fixed}
    floors = sum(layer.cost * layer.floor for layer in layers.values())
    budget = max(problem["budget"], floors)
    assert plan_ranks(problem["shares"], layers, budget=budget)[pinned] == held


@many
@given(problems())
def test_a_budget_of_exactly_the_floors_gives_the_floors_and_one_less_is_refused(problem):
    layers, shares = problem["layers"], problem["shares"]
    floors = {name: layer.floor for name, layer in layers.items()}
    low = cost_of(floors, layers)
    high = sum(layer.cost * layer.ceiling for layer in layers.values())
    assert plan_ranks(shares, layers, budget=low) == floors
    message = rf"budget of {low - 1} .* {len(layers)} layers .* take {low}: .* in \[{low}, {high}\]"
    with pytest.raises(BudgetError, match=message):
        plan_ranks(shares, layers, budget=low - 1)


@many
@given(st.dictionaries(st.text(max_size=3), bounds(max_cost=1), min_size=1), st.integers(0, 100))
def test_without_worth_the_smallest_rank_grows_first_then_the_first_name(layers, spare):
    budget = sum(layer.floor for layer in layers.values()) + spare
    ranks = plan_ranks(dict.fromkeys(layers, 0.0), layers, budget=budget)
    expected = {name: layer.floor for name, layer in layers.items()}
    for _ in range(spare):
        growable = [(r, n) for n, r in expected.items() if r < layers[n].ceiling]
        if growable:
            expected[min(growable)[1]] += 1
    assert ranks == expected


@many
@given(bounds(), st.floats(0, 1), st.integers(0, 600))
def test_one_layer_takes_all_that_fits(layer, share, spare):
    budget = layer.cost * layer.floor + spare
    ranks = plan_ranks({"only": share}, {"only": layer}, budget=budget)
    assert ranks == {"only": min(layer.ceiling, budget // layer.cost)}


@many
@given(problems(), st.data())
def test_lowest_ranks_of_shrinking_layers_give_the_plan_that_all_of_them_give(problem, data):
    layers, asked = problem["layers"], []
    highest = {name: min(layer.held, layer.ceiling) for name, layer in layers.items()}
    lowest = {
        name: data.draw(st.integers(min(layer.floor, highest[name]), highest[name]))
        for name, layer in layers.items()
    }

    def raised(known):
        return {n: replace(b, floor=max(b.floor, known.get(n, 1))) for n, b in layers.items()}

    def measure(names):
        asked.extend(names)
        return {name: lowest[name] for name in names}

    everything = sum(b.cost * max(b.floor, lowest[n]) for n, b in layers.items())
    assume(everything <= problem["budget"])
    given = problem["shares"], raised
    limits = {"budget": problem["budget"], "hysteresis": problem["hysteresis"]}
    ranks, _ = settle_ranks(*given, **limits, measure_lowest=measure, agree=dict)
    assert ranks == plan_ranks(**problem | {"layers": raised(lowest)})
    assert len(asked) == len(set(asked))


def test_lowest_ranks_of_layers_that_stay_or_grow_are_not_measured():
    layers = {
        name: LayerBounds(cost=1, floor=1, ceiling=9, held=held)
        for name, held in {"falls": 4, "stays": 3, "grows": 2}.items()
    }
    shares, asked = {"falls": 0.1, "stays": 0.3, "grows": 0.6}, []

    def measure(names):
        asked.extend(names)
        return dict.fromkeys(names, 1)

    limits = {"budget": 9, "hysteresis": 0.0}
    ranks, _ = settle_ranks(shares, lambda _: layers, **limits, measure_lowest=measure, agree=dict)
    assert ranks == {"falls": 1, "stays": 3, "grows": 5}
    assert asked == ["falls"]


def test_thousands_of_layers_are_planned_within_seconds():
    names = [f"layers.{index}.proj" for index in range(5000)]
    layers = {
        name: LayerBounds(cost=64 + 32 * (index % 3), floor=1, ceiling=64, held=8)
        for index, name in enumerate(names)
    }
    weights = {name: layers[name].cost * (1 + index % 7) for index, name in enumerate(names)}
    total = math.fsum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    budget = sum(8 * layer.cost for layer in layers.values())
    start = time.perf_counter()
    ranks = plan_ranks(shares, layers, budget=budget, hysteresis=0.25)
    assert time.perf_counter() - start < 10
    assert 0 <= budget - cost_of(ranks, layers) < 64


@many
@given(
    cost=st.integers(1, 99),
    held=st.integers(1, 40),
    widest=st.integers(1, 40),
    min_rank=st.integers(1, 40),
    above=st.integers(0, 40),
    kept_by_tolerance=st.integers(1, 40),
    limit=st.one_of(st.none(), st.floats(1, 64)),
    pinned=st.booleans(),
)
def test_the_bounds_of_a_layer_always_leave_it_a_rank(above, **given):
    max_rank = given["min_rank"] + above
    layer = bound_layer(**given, max_rank=max_rank)
    assert 1 <= layer.floor <= layer.ceiling
    if not given["pinned"]:
        assert layer.ceiling <= max_rank
