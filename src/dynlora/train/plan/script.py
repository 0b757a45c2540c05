"""Which rows a rehearsal takes: the longest ones a few at a time, or short ones in real batches."""

from dataclasses import dataclass

from dynlora.train.config import TrainingConfig
from dynlora.train.plan.batches import find_longest
from dynlora.train.task import TaskData
from dynlora.train.trainer import row_lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """The batches of a rehearsal, as places of rows in the data."""

    first: list[int]
    """Training rows of each batch of the first step."""
    later: list[int]
    """Training rows of each batch of the second step."""
    evaluation: list[int]
    """Validation rows of the evaluation before."""
    shapes: int
    """How many shapes the training batches have."""


def longest_rows(data: TaskData, config: TrainingConfig, steps: int, rows: int) -> Script:
    """Return batches of a few rows, as long as the run's batches become.

    Args:
        data: Both splits.
        config: How rows are put into batches.
        steps: Optimizer steps of the run.
        rows: Rows of each batch.
    """
    lengths, test_lengths = row_lengths(data.train), row_lengths(data.validation)
    found = find_longest(lengths, config, steps)
    later = found.first if found.later is None else found.later
    longest = max(range(len(test_lengths)), key=test_lengths.__getitem__)
    return Script(
        first=_padded(lengths, found.first, rows, alone=config.batch_size == 1),
        later=_padded(lengths, later, rows, alone=config.batch_size == 1),
        evaluation=_padded(test_lengths, longest, rows, alone=config.eval_batch_size == 1),
        shapes=len({lengths[found.first], lengths[later]}),
    )


def _padded(lengths: list[int], row: int, rows: int, *, alone: bool) -> list[int]:
    """Return a batch of copies of a row, with a shorter one at its end unless rows come alone.

    Models do without a mask where nothing is padded, which in a large batch is rare.
    """
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    return [row] * rows if alone else [row] * (rows - 1) + [shortest]


def short_rows(data: TaskData, rows: int, evaluation_rows: int) -> Script:
    """Return batches of as many rows as the run's, of two lengths in the lower half.

    Args:
        data: Both splits.
        rows: Rows of a training batch.
        evaluation_rows: Rows of an evaluation's batch.
    """
    lengths, test_lengths = row_lengths(data.train), row_lengths(data.validation)
    first, later = _short(lengths, 4), _short(lengths, 3)
    return Script(
        first=[first] * rows,
        later=[later] * rows,
        evaluation=[_short(test_lengths, 4)] * evaluation_rows,
        shapes=len({lengths[first], lengths[later]}),
    )


def _short(lengths: list[int], part: int) -> int:
    """Return a row whose length stands at a given part of all lengths that there are."""
    distinct = sorted(set(lengths))
    return lengths.index(distinct[len(distinct) // part])
