"""Tune a cell with Optuna: the same number of trials per cell, on validation rows only.

The first trial uses the method's defaults. The next nine depend only on the study's seed and their
number, so they are equal for all cells; later ones (TPE) also depend on earlier trials. An
interrupted tuning therefore resumes with the same trials.
"""

import math
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from benchmarks.harness.runner import Measure
from benchmarks.harness.runs import Cell, Choice, Jobs, key_of, plain
from benchmarks.harness.study import Space, Tuning
from dynlora.errors import StudyError
from dynlora.report.wording import lower_is_better
from dynlora.train.config import METRICS

STORAGE = ".tuning.journal"
"""Ending of the file with all trials, beside the study's tables."""


@dataclass(frozen=True, slots=True)
class OptunaTuner:
    """Tunes the cells of a study."""

    jobs: Jobs
    tuning: Tuning
    storage: JournalStorage

    def metric(self, cell: Cell) -> str:
        """Return the name of the validation metric to optimize."""
        task = self.jobs.config(cell).task
        return self.tuning.metric or METRICS[task][0]

    def tune(self, cell: Cell, measure: Measure) -> Choice:
        """Execute a cell's missing trials and return the best choice.

        Raises:
            StudyError: If a trial failed, or training diverged in all trials.
        """
        study = self._open(cell)
        worst = math.inf if lower_is_better(self.metric(cell)) else -math.inf
        for trial in self._ended(study):
            measure(trial.number, self._choice(trial, cell))  # restores a missing record
        while (done := len(self._ended(study))) < self.tuning.trials:
            trial = self._next(study, done)
            value = measure(trial.number, self._choice(trial, cell))
            if value is None:
                raise StudyError(
                    f"{cell.name} is not tuned: {done} of {self.tuning.trials} trials have ended"
                )
            found = value if math.isfinite(value) else worst
            # Another process may have reported the same result.
            study.tell(trial.number, found, skip_if_finished=True)
        return self._choice(self._best(study, cell), cell)

    def _ended(self, study: optuna.Study) -> list[FrozenTrial]:
        """Return the first `tuning.trials` completed trials; more may exist."""
        found = study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
        return sorted(found, key=lambda trial: trial.number)[: self.tuning.trials]

    def _best(self, study: optuna.Study, cell: Cell) -> FrozenTrial:
        """Return the best trial, the first if several are equal."""
        lower = lower_is_better(self.metric(cell))
        values = {trial.number: trial.value or 0.0 for trial in self._ended(study)}
        best = min(self._ended(study), key=lambda t: values[t.number] * (1 if lower else -1))
        if math.isinf(values[best.number]):
            raise StudyError(
                f"{cell.name} cannot be tuned: training diverged in all of its "
                f"{self.tuning.trials} trials"
            )
        return best

    def _open(self, cell: Cell) -> optuna.Study:
        """Return the Optuna study of a cell with the current settings."""
        defaults, spaces = self.jobs.defaults(cell), self._spaces()
        config = plain(self.jobs.trial(cell, self.tuning.seed, 0, defaults).config)
        setting = key_of(config, {"spaces": repr(spaces), "metric": self.metric(cell)})
        lower = lower_is_better(self.metric(cell))
        study = optuna.create_study(
            storage=self.storage,
            study_name=f"{self.jobs.study.name}/{cell.name}/{setting}",
            direction="minimize" if lower else "maximize",
            load_if_exists=True,
        )
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial({name: getattr(defaults, name) for name in spaces})
        return study

    def _spaces(self) -> dict[str, BaseDistribution]:
        named = {"learning_rate": self.tuning.learning_rate, "scale": self.tuning.scale}
        return {name: _distribution(space) for name, space in named.items() if space is not None}

    def _next(self, study: optuna.Study, done: int) -> FrozenTrial:
        """Return an unfinished trial, or a new one."""
        spaces = self._spaces()
        for begun in study.get_trials(states=(TrialState.RUNNING,), deepcopy=False):
            if begun.params.keys() == spaces.keys():
                return begun
            # Its process ended while it was proposed.
            study.tell(begun.number, state=TrialState.FAIL, skip_if_finished=True)
        study.sampler = TPESampler(seed=self.tuning.seed + done)
        number = study.ask(spaces).number
        return study.get_trials(deepcopy=False)[number]

    def _choice(self, trial: FrozenTrial, cell: Cell) -> Choice:
        defaults = self.jobs.defaults(cell)
        return Choice(
            learning_rate=trial.params.get("learning_rate", defaults.learning_rate),
            scale=trial.params.get("scale", defaults.scale),
        )


def open_tuner(jobs: Jobs, tuning: Tuning) -> OptunaTuner:
    """Return a study's tuner, which stores its trials beside the records."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = jobs.study.results
    folder.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(folder / f"{jobs.study.name}{STORAGE}"))
    return OptunaTuner(jobs, tuning, JournalStorage(backend))


def _distribution(space: Space) -> BaseDistribution:
    if space.choices:
        return CategoricalDistribution(space.choices)
    return FloatDistribution(space.low, space.high, log=True)
