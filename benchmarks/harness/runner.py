"""Execute the missing runs of a study, from the first trial to the last final run.

All tuning ends before the first final run, so that no choice depends on test rows.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness.assignment import Assignment, Executor
from benchmarks.harness.records import Records
from benchmarks.harness.runs import Choice, Combination, Jobs, Run
from benchmarks.harness.study import StudyError
from dynlora.train.config import JobConfig

T = TypeVar("T")
R = TypeVar("R")
Record = Mapping[str, Any]
Measure = Callable[[int, Choice], float | None]
"""Executes the trial with a number and returns its metric; infinite if training diverged, None if
it failed."""
Tune = Callable[[Combination, Measure], Choice]
"""Returns the best choice of a combination; raises StudyError if there is none."""
Watch = Callable[[Run, Record, bool], None]
"""Called with each run, its record, and whether the record existed before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The part of a study to execute."""

    combinations: Sequence[Combination]
    """Cells to tune, in order."""
    finals: Sequence[tuple[Combination, int]]
    """Cells and seeds of final runs, in order."""


def select(jobs: Jobs, only: Sequence[str]) -> Selection:
    """Return the final runs whose names match a glob, and the combinations to tune for them.

    Seeds change slowest, so that finished runs are comparable at any time. No glob selects all.

    Raises:
        StudyError: If a glob matches no run.
    """
    study, combinations = jobs.study, jobs.combinations()
    finals = [
        (combination, seed)
        for seed in study.seeds
        for combination in combinations
        if not only or any(fnmatchcase(f"{combination.name}/s{seed}", glob) for glob in only)
    ]
    idle = [g for g in only if not any(fnmatchcase(f"{c.name}/s{seed}", g) for c, seed in finals)]
    if idle:
        first = f"{combinations[0].name}/s{study.seeds[0]}"
        raise StudyError(
            f"`--only` must match the name of a run, such as {first}, but got {idle[0]}. Quote it, "
            "and see all names with `--dry-run`."
        )
    wanted = {combination for combination, _ in finals}
    return Selection(
        combinations=[combination for combination in combinations if combination in wanted],
        finals=finals,
    )


@dataclass(slots=True, kw_only=True)
class Runner:
    """Executes the runs of a study."""

    jobs: Jobs
    records: Records
    executor: Executor
    threads: int
    """Number of concurrent runs."""
    places: Mapping[str, Path]
    """This machine's folders, by placeholder."""
    keep: Path | None
    """Parent of the permanent run folders; None keeps none."""
    watch: Watch
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, selection: Selection, tune: Tune | None) -> list[str]:
        """Execute the missing runs.

        Returns:
            A sentence per combination whose tuning failed; its final runs are skipped.

        Raises:
            KeyboardInterrupt: If the user stopped it; current runs are recorded as interrupted.
        """
        tuned: dict[Combination, Choice | StudyError | None]
        tuned = dict.fromkeys(selection.combinations)
        if tune is not None:
            found = self._all(partial(self._tune, tune), selection.combinations)
            tuned = dict(zip(selection.combinations, found, strict=True))
        problems = [str(choice) for choice in tuned.values() if isinstance(choice, StudyError)]
        finals = [
            self.jobs.final(combination, seed, choice)
            for combination, seed in selection.finals
            if not isinstance(choice := tuned[combination], StudyError)
        ]
        self.records.put_aside(finals)
        self._all(self.do, finals)
        return problems

    def do(self, run: Run) -> Record:
        """Return the record of a run, executing the run unless it has ended before."""
        found = self.records.ended(run)
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

    def _tune(self, tune: Tune, combination: Combination) -> Choice | StudyError:
        """Return the best choice, or the reason for its absence."""
        tuning = self.jobs.study.tune
        assert tuning is not None

        def measure(number: int, choice: Choice) -> float | None:
            record = self.do(self.jobs.trial(combination, tuning.seed, number, choice))
            if record["status"] != "completed":
                return float("inf") if record["diverged"] else None
            value = record["validation"][self.jobs.metric(combination)]
            return float("inf") if value is None else float(value)

        try:
            return tune(combination, measure)
        except StudyError as error:
            return error

    def _all(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Process items concurrently and return their results in order."""
        with ThreadPoolExecutor(self.threads) as pool:
            waiting = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in waiting]
            except BaseException:
                for future in waiting:
                    future.cancel()
                self.executor.stop()
                raise


def place(run: Run, places: Mapping[str, Path]) -> JobConfig:
    """Return a run's job with placeholders replaced by this machine's folders."""
    config = run.config

    def filled(text: str | None) -> str | None:
        if text is None:
            return None
        for name, folder in places.items():
            text = text.replace("{" + name + "}", str(folder))
        return text

    return replace(
        config,
        model=replace(
            config.model, path=filled(config.model.path), teacher=filled(config.model.teacher)
        ),
        data=replace(config.data, path=filled(config.data.path)),
        lora=replace(config.lora, start_from=filled(config.lora.start_from)),
    )
