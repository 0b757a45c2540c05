"""Tune with Optuna: the same number of trials per combination, on validation rows only.

The first trial uses the method's defaults. The next nine depend only on the study's seed and their
number, so they are equal for all combinations; later ones (TPE) also depend on earlier trials. An
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
from benchmarks.harness.runs import Choice, Combination, Jobs, key_of, plain
from benchmarks.harness.study import Space, StudyError, Tuning
from dynlora.report.wording import LOWER_IS_BETTER

STORAGE = ".tuning.journal"
"""Ending of the file with all trials, beside the study's tables."""


@dataclass(frozen=True, slots=True)
class OptunaTuner:
    """Tunes the combinations of a study."""

    jobs: Jobs
    tuning: Tuning
    storage: JournalStorage

    def tune(self, combination: Combination, measure: Measure) -> Choice:
        """Execute a combination's missing trials and return the best choice.

        Raises:
            StudyError: If a trial failed, or training diverged in all trials.
        """
        search = self._open(combination)
        worst = math.inf if LOWER_IS_BETTER[self.jobs.metric(combination)] else -math.inf
        for trial in self._ended(search):
            measure(trial.number, self._choice(trial, combination))  # restores a missing record
        while (done := len(self._ended(search))) < self.tuning.trials:
            trial = self._next(search, done)
            value = measure(trial.number, self._choice(trial, combination))
            if value is None:
                raise StudyError(
                    f"{combination.name} is not tuned: {done} of {self.tuning.trials} trials "
                    "have ended"
                )
            found = value if math.isfinite(value) else worst
            # Another process may have reported the same result.
            search.tell(trial.number, found, skip_if_finished=True)
        return self._choice(self._best(search, combination), combination)

    def _ended(self, search: optuna.Study) -> list[FrozenTrial]:
        """Return the first `tuning.trials` completed trials; more may exist."""
        found = search.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
        return sorted(found, key=lambda trial: trial.number)[: self.tuning.trials]

    def _best(self, search: optuna.Study, combination: Combination) -> FrozenTrial:
        """Return the best trial, the first if several are equal."""
        lower = LOWER_IS_BETTER[self.jobs.metric(combination)]
        values = {trial.number: trial.value or 0.0 for trial in self._ended(search)}
        best = min(self._ended(search), key=lambda t: values[t.number] * (1 if lower else -1))
        if math.isinf(values[best.number]):
            raise StudyError(
                f"{combination.name} cannot be tuned: training diverged in all of its "
                f"{self.tuning.trials} trials"
            )
        return best

    def _open(self, combination: Combination) -> optuna.Study:
        """Return the Optuna study of a combination with the current settings."""
        defaults, spaces = self.jobs.defaults(combination), self._spaces()
        config = plain(self.jobs.trial(combination, self.tuning.seed, 0, defaults).config)
        setting = key_of(config, {"spaces": repr(spaces), "metric": self.jobs.metric(combination)})
        lower = LOWER_IS_BETTER[self.jobs.metric(combination)]
        search = optuna.create_study(
            storage=self.storage,
            study_name=f"{self.jobs.study.name}/{combination.name}/{setting}",
            direction="minimize" if lower else "maximize",
            load_if_exists=True,
        )
        if not search.get_trials(deepcopy=False):
            search.enqueue_trial({name: getattr(defaults, name) for name in spaces})
        return search

    def _spaces(self) -> dict[str, BaseDistribution]:
        named = {"learning_rate": self.tuning.learning_rate, "scale": self.tuning.scale}
        return {name: _distribution(space) for name, space in named.items() if space is not None}

    def _next(self, search: optuna.Study, done: int) -> FrozenTrial:
        """Return an unfinished trial, or a new one."""
        spaces = self._spaces()
        for begun in search.get_trials(states=(TrialState.RUNNING,), deepcopy=False):
            if begun.params.keys() == spaces.keys():
                return begun
            # Its process ended while it was proposed.
            search.tell(begun.number, state=TrialState.FAIL, skip_if_finished=True)
        search.sampler = TPESampler(seed=self.tuning.seed + done)
        number = search.ask(spaces).number
        return search.get_trials(deepcopy=False)[number]

    def _choice(self, trial: FrozenTrial, combination: Combination) -> Choice:
        defaults = self.jobs.defaults(combination)
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
    if space.is_range:
        return FloatDistribution(space.low, space.high, log=True)
    return CategoricalDistribution(space.choices)
