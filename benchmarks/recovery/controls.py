r"""Run the control arms of a study, one appended row per run; a killed process continues.

    python -m benchmarks.recovery.controls benchmarks/studies/controls.toml \
        --data DATA --minutes 110

The exit code is 0 if all runs have ended, and 2 if the time was up before. `--show` prints the
number of missing runs instead.
"""

import argparse
import math
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.recovery.arms import (
    ARMS,
    REFERRING,
    Plan,
    Schedule,
    Setting,
    grown_directions,
    layer_costs,
    make_plan,
    schedule_of,
    train,
)
from benchmarks.recovery.student import BATCH, Recovery, evaluate, score_pairs
from benchmarks.resumable.appended import AppendedTable, Row, current_commit
from benchmarks.resumable.search import Point, best_of, next_trial
from benchmarks.resumable.time_limit import TimeLimit, finish_all, study_options
from dynlora import DynamicLora
from dynlora.errors import NonFiniteError

COLUMNS = (
    "kind", "task", "r", "arm", "seed", "learning_rate", "scale", "steps", "validation_loss",
    "test_loss", "spearman", "parameters", "moved", "grown", "refreshed",
    "most_output_lost", "tokens_per_parameter", "seconds", "ranks", "schedule", "commit", "torch",
)  # fmt: skip
Pair = Point
"""Learning rate and scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """A study of control arms; the fields are the keys of its file, which explains them."""

    tasks: list[str]
    budgets: list[int]
    arms: list[str]
    seeds: list[int]
    steps: int
    score_pairs: bool
    tuning_seed: int
    most_trials: int
    trials: list[list[float]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm at one rank of one task."""

    task: str
    r: int
    arm: str

    def key(self, kind: str) -> dict[str, Any]:
        """Return the values by which rows of the cell are found."""
        return {"kind": kind, "task": self.task, "r": self.r, "arm": self.arm}


@dataclass(slots=True)
class Runner:
    """Executes missing runs until its time is up."""

    study: Controls
    table: AppendedTable
    data: Path
    cache: Path
    limit: TimeLimit
    tasks: dict[str, Recovery] = field(default_factory=dict)

    def choose(self, cell: Cell) -> Pair:
        """Return the pair with the lowest validation loss, after the missing trials.

        Raises:
            TimeUpError: If trials are missing.
        """
        while (pair := self.next_pair(ended := self.trials(cell))) is not None:
            self.run(cell, "trial", self.study.tuning_seed, pair)
        return best_of(ended)

    def next_pair(self, ended: dict[Pair, float]) -> Pair | None:
        """Return the next pair to try; None if the search has ended."""
        study = self.study
        return next_trial(study.trials, ended, most=study.most_trials, moving=2)

    def trials(self, cell: Cell) -> dict[Pair, float]:
        """Return the validation loss per pair; infinite if the run diverged."""
        rows = self.table.select(**cell.key("trial"))
        return {(row["learning_rate"], row["scale"]): _finite(row) for row in rows}

    def finish(self, cell: Cell, seeds: list[int]) -> None:
        """Execute the missing trials and final runs of a cell."""
        pair = self.choose(cell)
        for seed in seeds:
            if self.table.find(**cell.key("final"), seed=seed) is None:
                self.run(cell, "final", seed, pair)

    def run(self, cell: Cell, kind: str, seed: int, pair: Pair) -> None:
        """Execute one run and append its row.

        Raises:
            TimeUpError: If no time is left.
        """
        self.limit.check()
        if cell.task not in self.tasks:
            self.tasks[cell.task] = Recovery(cell.task, self.data, self.cache)
        task, start = self.tasks[cell.task], time.process_time()
        setting = Setting(
            r=cell.r, learning_rate=pair[0], scale=pair[1], seed=seed, steps=self.study.steps
        )
        plan = make_plan(
            cell.arm,
            layer_costs(task.base),
            cell.r,
            seed=seed,
            reference=self.reference(cell, kind, seed),
        )
        row: Row = {**cell.key(kind), "seed": seed, "learning_rate": pair[0], "scale": pair[1]}
        row |= self.measure(task, plan, setting, final=kind == "final")
        row |= {"steps": setting.steps, "commit": current_commit(), "torch": torch.__version__}
        self.table.append(row | {"seconds": round(time.process_time() - start, 1)})
        print(kind, cell, seed, pair, row["validation_loss"], flush=True)

    def reference(self, cell: Cell, kind: str, seed: int) -> Schedule | None:
        """Return the ranks of the dynamic run with the same seed; None if the arm needs none."""
        if cell.arm not in REFERRING:
            return None
        source = Cell(cell.task, cell.r, "dynamic")
        learning_rate, scale = self.choose(source)
        wanted = {"seed": seed, "learning_rate": learning_rate, "scale": scale}
        row = self.table.find(**source.key(kind), **wanted)
        if row is None:
            self.run(source, kind, seed, (learning_rate, scale))
            return self.reference(cell, kind, seed)
        return {int(step): ranks for step, ranks in row["schedule"].items()}

    def measure(self, task: Recovery, plan: Plan, setting: Setting, *, final: bool) -> Row:
        """Train, and return losses, ranks and changes of ranks."""
        try:
            trained = train(task, plan, setting)
        except NonFiniteError:
            return {"validation_loss": math.inf}
        model, dynamic = trained.model, trained.dynamic
        row: Row = {"refreshed": trained.refreshed}
        row["validation_loss"] = evaluate(model, task.splits["validation"])
        if final:
            row["test_loss"] = evaluate(model, task.splits["test"])
        if final and self.study.score_pairs:
            row["spearman"] = score_pairs(model, task.pairs)
        tokens = float(task.splits["train"].texts.lengths.float().mean()) * BATCH * setting.steps
        row["tokens_per_parameter"] = round(tokens / dynamic.parameters, 2)
        return row | describe_ranks(dynamic, plan.wide * setting.r)


def describe_ranks(dynamic: DynamicLora, r: int) -> Row:
    """Return the final ranks of a run that began at rank `r`, and what its events changed."""
    schedule = schedule_of(dynamic)
    grown = grown_directions(schedule, dict.fromkeys(dynamic.ranks, r)) if schedule else {}
    lost = [layer.output_lost for event in dynamic.history for layer in event.layers.values()]
    return {
        "parameters": dynamic.parameters,
        "moved": any(grown.values()),
        "grown": sum(grown.values()),
        "most_output_lost": round(max(lost, default=0.0), 4),
        "ranks": dynamic.ranks,
        "schedule": schedule,
    }


def _finite(row: Row) -> float:
    loss = float(row["validation_loss"])
    return loss if math.isfinite(loss) else math.inf


def cells(study: Controls, options: argparse.Namespace) -> Iterator[Cell]:
    """Yield the selected cells, lowest rank first."""
    for r in options.budgets or study.budgets:
        for task in options.tasks or study.tasks:
            for arm in options.arms or study.arms:
                yield Cell(task, r, arm)


def count_missing(runner: Runner, wanted: list[Cell], seeds: list[int]) -> int:
    """Return the number of missing runs, without trials that widen a search."""
    count = 0
    for cell in wanted:
        ended = runner.trials(cell)
        count += sum(tuple(pair) not in ended for pair in runner.study.trials)
        done = {row["seed"] for row in runner.table.select(**cell.key("final"))}
        count += len(set(seeds) - done)
    return count


def main() -> int:
    """Execute the missing runs of the selected cells, and return the exit code."""
    parser = study_options(__doc__, "runs/recovery")
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--budgets", nargs="+", type=int)
    options = parser.parse_args()
    study = Controls(**tomllib.loads(options.study.read_text()))
    table = AppendedTable(options.out / f"{options.study.stem}.csv", COLUMNS)
    runner = Runner(study, table, options.data, options.cache, TimeLimit(options.minutes))
    wanted, seeds = list(cells(study, options)), options.seeds or study.seeds
    print(f"{count_missing(runner, wanted, seeds)} runs are missing", flush=True)
    if options.show:
        return 0
    return finish_all(runner.finish, ((cell, seeds) for cell in wanted))


if __name__ == "__main__":
    sys.exit(main())
