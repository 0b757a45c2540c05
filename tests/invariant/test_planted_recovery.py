"""Invariant 11: where need is concentrated the budget goes; where there is none it stays."""

import math

import pytest

from dynlora import DynamicLoraConfig
from tests.planted import RANK, STEPS, Planted

pytestmark = pytest.mark.timeout(1200)  # twelve runs; minutes on a busy machine

SEEDS = range(6)
METRICS = ("signal", "spectral", "sensitivity", "gradient_norm")
"""Those that claim to find needs."""


@pytest.fixture(scope="module")
def outcomes():
    """Train uniform ranks and the default configuration on the same six tasks."""
    found = []
    for seed in SEEDS:
        uniform = Planted(seed).train(
            DynamicLoraConfig(importance="uniform", total_steps=STEPS), lr=3e-3
        )
        task = Planted(seed)
        dynamic = task.train(DynamicLoraConfig(total_steps=STEPS), lr=3e-3)
        found.append((task.names, uniform[1], dynamic[1], dynamic[0]))
    return found


def test_most_of_the_budget_that_layers_gave_up_goes_to_the_planted_two(outcomes):
    given_up, planted = 0, 0
    for names, _, _, dynamic in outcomes:
        moves = {x.name: (dynamic.ranks[x.name] - RANK) * x.cost for x in dynamic._layers}
        given_up -= sum(move for move in moves.values() if move < 0)
        planted += sum(moves[name] for name in names)
    assert given_up > 0.1 * sum(dynamic.budget for *_, dynamic in outcomes)
    assert planted > 0.5 * given_up


def test_the_default_configuration_ends_with_a_lower_loss_than_uniform_ranks(outcomes):
    ratios = [dynamic / uniform for _, uniform, dynamic, _ in outcomes]
    assert math.prod(ratios) ** (1 / len(ratios)) < 0.85
    assert sum(ratio < 0.9 for ratio in ratios) >= 5
    assert max(ratios) < 1.05


@pytest.mark.parametrize("metric", METRICS)
def test_every_gradient_metric_puts_the_planted_layers_first_on_one_task(metric, scored):
    names, scores = scored
    assert set(sorted(scores[metric], key=scores[metric].get)[-2:]) == set(names)


@pytest.fixture(scope="module")
def scored():
    task = Planted(6)
    uniform = DynamicLoraConfig(importance="uniform", total_steps=STEPS)
    _, _, scores = task.train(uniform, lr=5e-3, steps=400, metrics=METRICS)
    return task.names, scores


@pytest.mark.parametrize("seed", range(3))
def test_random_targets_move_nothing(seed):
    task = Planted(seed)
    config = DynamicLoraConfig(total_steps=STEPS)
    dynamic, _, _ = task.train(config, lr=3e-3, steps=STEPS // 2, random_targets=True)
    assert len(dynamic.history) == config.events
    assert set(dynamic.ranks.values()) == {RANK}
