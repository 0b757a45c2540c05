"""A study from its first trial to its last final run: what is there is skipped, the rest is done.

All tuning ends before the first final run begins, so nothing that was chosen has seen test rows.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from dynlora.bench.assignment import Assignment, Executor
from dynlora.bench.records import Records
from dynlora.bench.runs import Cell, Choice, Jobs, Run
from dynlora.bench.tuning import Measure, Tuner
from dynlora.errors import StudyError
from dynlora.train.config import JobConfig

T = TypeVar("T")
Record = Mapping[str, Any]
Watch = Callable[[Run, Record, bool], None]
"""Is told of each run, its record, and whether that was there before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The part of a study that is to be done now."""

    cells: Sequence[Cell]
    """In the order in which they are tuned."""
    finals: Sequence[tuple[Cell, int]]
    """Cells and seeds, in the order in which they are run."""


def select(jobs: Jobs, only: str | None) -> Selection:
    """Return the final runs whose names match a glob, and the cells that they need tuned.

    Seeds change slowest, so that what is there at any time can be compared.

    Raises:
        StudyError: If there is none.
    """
    study, cells = jobs.study, jobs.cells()
    finals = [
        (cell, seed)
        for seed in study.seeds
        for cell in cells
        if only is None or fnmatchcase(f"{cell.name}/s{seed}", only)
    ]
    if not finals:
        first = f"{cells[0].name}/s{study.seeds[0]}"
        raise StudyError(
            f"`--only` must match the name of a run, such as {first}, got {only}: quote it, and "
            "see all names with `--dry-run`."
        )
    wanted = {cell for cell, _ in finals}
    return Selection(cells=[cell for cell in cells if cell in wanted], finals=finals)


@dataclass(slots=True, kw_only=True)
class Runner:
    """What does the runs of a study."""

    jobs: Jobs
    records: Records
    executor: Executor
    threads: int
    """Runs under way at once."""
    places: Mapping[str, Path]
    """Folders of this machine, by placeholder."""
    keep: Path | None
    """Folder in which the folders of runs stay; None keeps none."""
    watch: Watch
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, selection: Selection, tuner: Tuner | None) -> list[str]:
        """Do what is missing.

        Returns:
            Why cells were not tuned, a sentence for each; their final runs were not tried.

        Raises:
            KeyboardInterrupt: If the user stopped it; what was under way is recorded as that.
        """
        tuned: dict[Cell, Choice | None] = dict.fromkeys(selection.cells)
        problems: list[str] = []
        if tuner is not None:
            for cell, choice in self._each(lambda c: self._tune(tuner, c), selection.cells):
                if isinstance(choice, Choice):
                    tuned[cell] = choice
                else:
                    del tuned[cell]
                    problems.append(choice)
        finals = [
            self.jobs.final(cell, seed, tuned[cell])
            for cell, seed in selection.finals
            if cell in tuned
        ]
        for run in finals:
            self.records.put_aside(run)
        for _ in self._each(self.do, finals):
            pass
        return problems

    def do(self, run: Run) -> Record:
        """Return the record of a run, which is done if it has not completed before."""
        found = self.records.completed(run)
        if found is not None:
            self.watch(run, found, True)
            return found
        outcome = self.executor.execute(
            Assignment(
                config=place(run, self.places),
                exam=run.exam,
                keep=None if self.keep is None else self.keep / f"{run.name}-{run.key}",
                workspace=None,
            )
        )
        with self._lock:
            record = self.records.write(run, outcome)
            self.watch(run, record, False)
        return record

    def _tune(self, tuner: Tuner, cell: Cell) -> Choice | str:
        try:
            return tuner.tune(cell, self._measure(tuner, cell))
        except StudyError as error:
            return str(error)

    def _measure(self, tuner: Tuner, cell: Cell) -> Measure:
        def measure(number: int, choice: Choice) -> float | None:
            record = self.do(self.jobs.trial(cell, tuner.tuning.seed, number, choice))
            if record["status"] != "completed":
                return float("inf") if record["diverged"] else None
            value = record["validation"][tuner.metric(cell)]
            return float("inf") if value is None else float(value)

        return measure

    def _each(self, work: Callable[[T], Any], items: Iterable[T]) -> Iterable[tuple[T, Any]]:
        """Yield each item with what became of it, some under way at once."""
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: list[tuple[T, Future[Any]]] = [
                (item, pool.submit(work, item)) for item in items
            ]
            try:
                for item, future in waiting:
                    yield item, future.result()
            except BaseException:
                for _, future in waiting:
                    future.cancel()
                self.executor.stop()
                raise


def place(run: Run, places: Mapping[str, Path]) -> JobConfig:
    """Return a run's job with the folders of this machine in place of the placeholders."""
    config = run.config

    def filled(text: str | None) -> str | None:
        if text is None:
            return None
        for name, folder in places.items():
            text = text.replace("{" + name + "}", str(folder))
        return text

    return replace(
        config,
        model=replace(config.model, path=filled(config.model.path)),
        data=replace(config.data, path=filled(config.data.path)),
        lora=replace(config.lora, start_from=filled(config.lora.start_from)),
    )
