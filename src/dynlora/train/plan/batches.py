"""The shapes of a run's batches, known before it begins: the longest ones, and how many differ."""

from dataclasses import dataclass, replace

from dynlora.train.config import TrainingConfig
from dynlora.train.trainer import make_sampler, total_steps

EPOCHS = 3
"""Epochs whose shapes are counted; later ones bring few that are new."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongestRows:
    """The longest row of the first optimizer step, and of all later ones together."""

    first: int
    """Place of the row among the training rows."""
    later: int | None
    """As `first`; None for a run of one step."""


def find_longest(lengths: list[int], config: TrainingConfig, steps: int) -> LongestRows:
    """Return the rows whose lengths decide how large batches become.

    They differ: with `group_by_length` the longest rows of all come first, when the optimizer has
    no state yet.

    Args:
        lengths: Of the training rows in tokens.
        config: How they are put into batches.
        steps: Optimizer steps of the run, at least 1.
    """
    a_step = config.batch_size * config.gradient_accumulation
    order = list(make_sampler(lengths, config))
    first = max(order[:a_step], key=lengths.__getitem__)
    if steps == 1:
        return LongestRows(first=first, later=None)
    later = order[a_step : steps * a_step]
    if steps > total_steps(len(lengths), replace(config, epochs=1.0, max_steps=None)):
        later = order  # the next epoch's order is another one of the same rows
    return LongestRows(first=first, later=max(later, key=lengths.__getitem__))


def count_shapes(lengths: list[int], config: TrainingConfig, steps: int) -> int:
    """Return how many shapes the training batches of a run have, in its first `EPOCHS` epochs.

    Args:
        lengths: Of the training rows in tokens.
        config: How they are put into batches.
        steps: Optimizer steps of the run.
    """
    sampler, size = make_sampler(lengths, config), config.batch_size
    left, shapes = steps * config.gradient_accumulation, set[tuple[int, int]]()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        found = _shapes([lengths[row] for row in sampler], size)[:left]
        shapes.update(found)
        left -= len(found)
    return len(shapes)


def count_evaluation_shapes(lengths: list[int], batch_size: int) -> int:
    """Return how many shapes the batches of an evaluation have, whose rows come as they are."""
    return len(set(_shapes(lengths, batch_size)))


def _shapes(lengths: list[int], size: int) -> list[tuple[int, int]]:
    """Return the rows and the tokens of each batch."""
    batches = (lengths[begin : begin + size] for begin in range(0, len(lengths), size))
    return [(len(batch), max(batch)) for batch in batches]
