r"""Compare dynamic ranks with LoRA and AdaLoRA on shifted, noisy, hostile and small data.

    python -m benchmarks.last_blocks.evaluation benchmarks/studies/evaluation.toml \
        --data DATA --decoder SMOLLM2

Appends one row per run; a killed process continues. The exit code is 0 if all runs have ended, and
2 if the time was up before. `--show` prints the number of missing final runs instead.
"""

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.last_blocks.frozen_trunk import evaluate
from benchmarks.last_blocks.natural import describe_moves
from benchmarks.last_blocks.runs import COLUMNS, Runner, make_runner, run_options
from benchmarks.last_blocks.tasks import PARTS, TaskConfig, read_screen
from benchmarks.last_blocks.training import Run, Trained
from benchmarks.resumable.appended import AppendedTable, Row
from benchmarks.resumable.time_limit import finish_all
from dynlora.history import Event

RECORDED = (*COLUMNS, "peak_parameters", "moved", "judged", "turns")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A comparison; the fields are the keys of its file, which explains them."""

    screen: str
    arms: list[str]
    learning_rates: list[float]
    centres: dict[str, float]
    seeds: list[int]
    questions: dict[str, list[str]]
    tasks: dict[str, dict[str, Any]]
    arms_of: dict[str, list[str]] = field(default_factory=dict)
    seeds_of: dict[str, list[int]] = field(default_factory=dict)
    rates_of: dict[str, tuple[str, float]] = field(default_factory=dict)

    def cells(self, questions: Sequence[str] | None) -> list[tuple[str, str]]:
        """Return the tasks and arms of some questions, or of all."""
        tasks = [task for name in questions or self.questions for task in self.questions[name]]
        return [(task, arm) for task in tasks for arm in self.arms_of.get(task, self.arms)]

    def configs(self) -> dict[str, TaskConfig]:
        """Return all tasks, which may be `like` another one apart from some values."""
        found = {}
        for name, given in self.tasks.items():
            values = self.tasks[given.get("like", name)] | given
            values.pop("like", None)
            found[name] = TaskConfig(**values)
        return found

    def finish(self, runner: Runner, task: str, arm: str) -> None:
        """Execute the missing trials and final runs of an arm on a task.

        Raises:
            TimeUpError: If runs are missing.
        """
        tuned, factor = self.rates_of.get(task, (task, 1.0))
        first = [rate * self.centres.get(arm, 1.0) for rate in self.learning_rates]
        _, rate = runner.search(tuned, [arm], first)
        runner.finish(task, arm, rate * factor, self.seeds_of.get(task, self.seeds))


def count_turns(events: Sequence[Event]) -> tuple[int, int]:
    """Return how many rank changes go back on the layer's change before, and how many there are."""
    last: dict[str, int] = {}
    turned = changed = 0
    for event in events:
        for name, layer in event.layers.items():
            change = layer.rank_after - layer.rank_before
            if change:
                changed += 1
                turned += change * last.get(name, 0) < 0
                last[name] = change
    return turned, changed


def describe_sets(run: Run, trained: Trained) -> Row:
    """Return the values of `describe_moves`, turns, and what a final run gives for each set."""
    row = describe_moves(run, trained) | {"turns": count_turns(trained.controller.history)}
    if run.kind == "final":
        sets = {name: part for name, part in run.task.parts.items() if name not in PARTS}
        judged = {n: evaluate(trained.model, part, run.task.head) for n, part in sets.items()}
        row["judged"] = {"test": trained.judged, **judged}
    return row


def main() -> int:
    """Execute the missing runs of the selected questions, and return the exit code."""
    options = run_options(__doc__).parse_args()
    study = Evaluation(**tomllib.loads(options.study.read_text()))
    table = AppendedTable(options.out / f"{options.study.stem}.csv", RECORDED)
    screen = replace(read_screen(options.study.with_name(study.screen)), tasks=study.configs())
    runner = make_runner(screen, table, options)
    runner.describe = describe_sets
    cells = study.cells(options.tasks)
    if options.show:
        missing = sum(
            runner.missing(task, [arm], study.seeds_of.get(task, study.seeds))
            for task, arm in cells
        )
        print(f"{missing} final runs are missing")
        return 0
    return finish_all(study.finish, ((runner, *cell) for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
