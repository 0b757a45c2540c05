r"""Compare dynamic ranks with LoRA, AdaLoRA and EVA on tasks of the screen.

    python -m benchmarks.last_blocks.natural benchmarks/studies/natural.toml \
        --data DATA --decoder SMOLLM2 --vision VISION

Appends one row per run; a killed process continues. The exit code is 0 if all runs have ended, and
2 if the time was up before. `--show` prints the number of missing runs instead.
"""

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from benchmarks.last_blocks.arms import CEILING, UNIFORM
from benchmarks.last_blocks.runs import COLUMNS, Runner, describe, loss_in, make_runner, run_options
from benchmarks.last_blocks.tasks import read_screen
from benchmarks.last_blocks.training import Run, Trained
from benchmarks.resumable.appended import AppendedTable, Row, read_rows, select
from benchmarks.resumable.time_limit import finish_all
from dynlora.history import moved


@dataclass(frozen=True, slots=True, kw_only=True)
class Natural:
    """A comparison; the fields are the keys of its file, which explains them."""

    screen: str
    r: int
    tasks: list[str]
    arms: list[str]
    factors: list[float]
    seeds: list[int]
    centres: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs of a comparison, some of whose trials are copies of the screen's."""

    study: Natural
    runner: Runner
    screened: Sequence[Row]
    """The screen's rows."""

    def finish(self, task: str, arm: str, seeds: list[int]) -> None:
        """Execute the missing trials and final runs of an arm on a task.

        Raises:
            TimeUpError: If runs are missing.
        """
        known = self.runner.trials(task, [arm])
        for row in self.screen_trials(task, arm):
            if (row["learning_rate"], 0.0) not in known:
                self.runner.table.append(row | {"arm": arm, "r": self.study.r})
        _, rate = self.runner.search(task, [arm], self.rates(task, arm))
        self.runner.finish(task, arm, rate, seeds)

    def missing(self, task: str, arm: str, seeds: list[int]) -> int:
        """Return the number of missing runs, without trials that widen the search."""
        tried = {rate for rate, _ in self.runner.trials(task, [arm])}
        tried |= {row["learning_rate"] for row in self.screen_trials(task, arm)}
        return len({*self.rates(task, arm)} - tried) + self.runner.missing(task, [arm], seeds)

    def rates(self, task: str, arm: str) -> list[float]:
        """Return the first rates of an arm, around a multiple of LoRA's best rate in the screen."""
        best = min(self.screen_trials(task, UNIFORM), key=loss_in)["learning_rate"]
        centre = best * self.study.centres.get(arm, 1.0)
        return [centre * factor for factor in self.study.factors]

    def screen_trials(self, task: str, arm: str) -> list[Row]:
        """Return the screen's trials of an arm on a task; its `ceiling` is LoRA at that rank."""
        at_ceiling = self.study.r == self.runner.study.ceiling
        screened = CEILING if arm == UNIFORM and at_ceiling else arm
        return select(self.screened, kind="trial", task=task, arm=screened)


def describe_moves(run: Run, trained: Trained) -> Row:
    """Return the size of a trained adapter, its peak, and whether any rank changed at an event."""
    controller = trained.controller
    row = describe(run, trained) | {"peak_parameters": controller.peak_parameters}
    return row | {"moved": any(moved(event) for event in controller.history)}


def main() -> int:
    """Execute the missing runs of the selected tasks, and return the exit code."""
    parser = run_options(__doc__)
    parser.add_argument("--screen", type=Path, default=Path("benchmarks/results/screen.csv"))
    options = parser.parse_args()
    study = Natural(**tomllib.loads(options.study.read_text()))
    columns = (*COLUMNS, "peak_parameters", "moved")
    table = AppendedTable(options.out / f"{options.study.stem}.csv", columns)
    screen = replace(read_screen(options.study.with_name(study.screen)), r=study.r)
    runner = make_runner(screen, table, options)
    runner.describe = describe_moves
    comparison = Comparison(study, runner, read_rows(options.screen))
    cells = [*product(options.tasks or study.tasks, study.arms)]
    seeds = options.seeds or study.seeds
    missing = sum(comparison.missing(*cell, seeds) for cell in cells)
    print(f"{missing} runs are missing", flush=True)
    if options.show:
        return 0
    return finish_all(comparison.finish, ((*cell, seeds) for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
