"""Rank plans over their whole domain: bounds, budget, order, ties, and steadiness under noise."""

import math

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynlora import DynamicLoraConfig
from dynlora.adjuster import LayerBounds, adjust, plan_ranks
from dynlora.allocator import allocate
from dynlora.types import Assessment
from tests.unit.test_adjuster import Shape

many = settings(deadline=None, max_examples=50, derandomize=True)


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
@given(problems(), st.integers(1, 50))
def test_plans_lie_within_bounds_spend_the_budget_and_do_not_depend_on_order(problem, more):
    ranks, layers, budget = plan_ranks(**problem), problem["layers"], problem["budget"]
    assert ranks.keys() == layers.keys()
    assert all(layers[n].floor <= rank <= layers[n].ceiling for n, rank in ranks.items())
    spent = cost_of(ranks, layers)
    assert spent <= budget
    growable = [layers[n].cost for n, rank in ranks.items() if rank < layers[n].ceiling]
    assert budget - spent < min(growable, default=math.inf)
    assert cost_of(plan_ranks(**problem | {"budget": budget + more}), layers) >= spent
    turned = problem | {
        "shares": dict(sorted(problem["shares"].items(), reverse=True)),
        "layers": dict(reversed(list(layers.items()))),
    }
    assert plan_ranks(**turned) == ranks


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


@st.composite
def events(draw):
    """Draw all measurements of an event, for up to 6 layers."""
    layers = [
        Shape(
            name=f"{index}",
            r=draw(st.integers(1, 12)),
            cost=draw(st.integers(1, 40)),
            widest=draw(st.integers(1, 40)),
            is_trained=draw(st.integers(0, 9)) > 0,
        )
        for index in range(draw(st.integers(1, 6)))
    ]
    names = [layer.name for layer in layers]
    some = st.lists(st.sampled_from(names), unique=True)
    scored = draw(some)
    return {
        "layers": layers,
        "scores": {name: draw(st.floats(0, 9)) for name in scored},
        "directions": {name: draw(st.floats(1, 9)) for name in scored},
        "unreached": set(draw(some)) - set(scored),
        "input_limits": {name: draw(st.floats(1, 20)) for name in draw(some)},
        "min_rank": draw(st.integers(1, 4)),
        "pinned": tuple(draw(some)[:1]),
        "budget": sum(x.cost * x.r for x in layers) + draw(st.integers(0, 50)),
        "max_rank": draw(st.integers(12, 40)),
    }


def arguments(drawn):
    """Return the arguments of `adjust`, made outside of the strategy."""
    config = DynamicLoraConfig(min_rank=drawn["min_rank"], pinned=drawn["pinned"], hysteresis=0.25)
    assessed = Assessment(**{key: drawn[key] for key in ("scores", "directions", "unreached")})
    same = {key: drawn[key] for key in ("layers", "input_limits", "budget", "max_rank")}
    return same | {"assessed": assessed, "config": config}


@many
@given(events(), st.data())
def test_minima_of_shrinking_layers_give_the_plan_of_all_minima(event, data):
    event = arguments(event)
    layers = event["layers"]
    shares = allocate(event["assessed"], layers, {}, event["config"])
    lowest = {layer.name: data.draw(st.integers(1, layer.r)) for layer in layers}
    minima = {}
    while True:
        found, _ = adjust(shares, **event, minima=minima)
        shrinking = {x.name for x in layers if found[x.name] < x.r}
        if shrinking <= minima.keys():
            break
        minima |= {name: lowest[name] for name in shrinking}
    assert found == adjust(shares, **event, minima=lowest)[0]
    assert all(found[name] >= lowest[name] for name in minima)
    assert sum(x.cost * found[x.name] for x in layers) <= event["budget"]
