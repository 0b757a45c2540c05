r"""Screen tasks: does rank bind, is the need uneven, and how much does `r: auto` need?

    python -m benchmarks.last_blocks.screen benchmarks/studies/screen.toml \
        --data DATA --decoder SMOLLM2 --vision VISION

Appends one row per run; a killed process continues. The exit code is 0 if all runs have ended, and
2 if the time was up before. `--show` prints the number of missing runs instead.
"""

import sys
from functools import partial
from itertools import product

from benchmarks.last_blocks.arms import ALLOCATIONS, AUTO, CEILING, UNIFORM, WIDE
from benchmarks.last_blocks.runs import COLUMNS, Runner, make_runner, run_options
from benchmarks.last_blocks.tasks import read_screen
from benchmarks.resumable.appended import AppendedTable
from benchmarks.resumable.time_limit import finish_all


def finish(runner: Runner, task: str, criterion: str, seeds: list[int]) -> None:
    """Execute the missing trials and final runs of a criterion on a task.

    Raises:
        TimeUpError: If runs are missing.
    """
    study = runner.study
    _, rate = runner.search(task, [UNIFORM], study.learning_rates)
    if criterion == "a":
        arms = [(UNIFORM, rate), runner.search(task, [WIDE], [rate])]
    elif criterion == "b":
        rates = [rate * factor for factor in study.allocation_rates]
        arms = [runner.search(task, ALLOCATIONS, rates)]
    else:
        ceiling = runner.search(task, [CEILING], [rate])
        arms = [ceiling, (AUTO, ceiling[1])]
    for arm, chosen in arms:
        runner.finish(task, arm, chosen, seeds)


def count_missing(runner: Runner, wanted: list[tuple[str, str]], seeds: list[int]) -> int:
    """Return the number of missing runs, without trials that widen a search."""
    study, count = runner.study, 0
    for task, criterion in wanted:
        if criterion == "a":
            searches = [([UNIFORM], len(study.learning_rates)), ([WIDE], 1)]
        elif criterion == "b":
            searches = [(ALLOCATIONS, len(ALLOCATIONS) * len(study.allocation_rates))]
        else:
            searches = [([CEILING], 1), ([AUTO], 0)]
        for arms, trials in searches:
            count += max(0, trials - len(runner.trials(task, arms)))
            count += runner.missing(task, arms, seeds)
    return count


def main() -> int:
    """Execute the missing runs of the selected tasks and criteria, and return the exit code."""
    parser = run_options(__doc__)
    parser.add_argument("--criteria", nargs="+", choices=("a", "b", "c"), default=["a", "b"])
    options = parser.parse_args()
    study = read_screen(options.study)
    table = AppendedTable(options.out / f"{options.study.stem}.csv", COLUMNS)
    runner = make_runner(study, table, options)
    wanted = [*product(options.tasks or study.tasks, options.criteria)]
    wanted.sort(key=lambda cell: cell[1])
    seeds = options.seeds or study.seeds
    print(f"{count_missing(runner, wanted, seeds)} runs are missing", flush=True)
    if options.show:
        return 0
    return finish_all(partial(finish, runner), ((*cell, seeds) for cell in wanted))


if __name__ == "__main__":
    sys.exit(main())
