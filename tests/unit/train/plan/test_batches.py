"""The batches of a run, known before it: held against those that its sampler gives."""

import random

import pytest

from dynlora.train.config import TrainingConfig
from dynlora.train.plan.batches import count_evaluation_shapes, count_shapes, find_longest
from dynlora.train.trainer import make_sampler


def lengths_of(count: int) -> list[int]:
    rng = random.Random(0)
    return [rng.randint(5, 40) for _ in range(count)]


def steps_of(lengths: list[int], config: TrainingConfig, epochs: int) -> list[list[list[int]]]:
    """Return for each optimizer step the lengths in each of its batches."""
    sampler, batches, steps = make_sampler(lengths, config), [], []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = [lengths[row] for row in sampler]
        size = config.batch_size
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        each = config.gradient_accumulation
        steps += [batches[at : at + each] for at in range(0, len(batches), each)]
    return steps


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_longest_rows_are_those_of_the_first_step_and_of_later_ones(
    grouped: bool, accumulation: int, count: int
) -> None:
    config = TrainingConfig(
        batch_size=4, group_by_length=grouped, gradient_accumulation=accumulation, max_steps=count
    )
    lengths = lengths_of(101)
    found = find_longest(lengths, config, count)
    steps = steps_of(lengths, config, 1)[:count]
    most = [max(max(batch) for batch in step) for step in steps]
    assert lengths[found.first] == most[0]
    later = None if found.later is None else lengths[found.later]
    assert later == max(most[1:], default=None)


def test_with_grouping_the_longest_row_of_all_comes_first() -> None:
    lengths = lengths_of(101)
    found = find_longest(lengths, TrainingConfig(batch_size=4), 20)
    assert lengths[found.first] == max(lengths)
    assert found.later is not None


def test_a_second_epoch_brings_the_longest_rows_again() -> None:
    lengths = [5] * 39 + [40]
    config = TrainingConfig(batch_size=4)
    once, twice = find_longest(lengths, config, 10), find_longest(lengths, config, 11)
    assert [once.first, lengths[once.later or 0]] == [39, 5]
    assert [twice.first, twice.later] == [39, 39]


@pytest.mark.parametrize("epochs", [1, 2])
def test_shapes_are_counted_as_batches_are_padded(epochs: int) -> None:
    lengths, config = lengths_of(90), TrainingConfig(batch_size=4, gradient_accumulation=2)
    steps = steps_of(lengths, config, epochs)
    shapes = {(len(batch), max(batch)) for step in steps for batch in step}
    assert count_shapes(lengths, config, len(steps)) == len(shapes)
    assert count_shapes(lengths, config, 1) == len({(4, max(batch)) for batch in steps[0]})


def test_an_evaluation_takes_rows_as_they_come() -> None:
    assert count_evaluation_shapes([3, 9, 9, 1, 9], 2) == 2, "9 of 2 rows, 9 of 1"
    assert count_evaluation_shapes([1] * 6, 3) == 1
