"""Tune with Optuna: the same number of trials per combination, on validation rows only.

The first trial uses the method's defaults. The next nine depend only on the study's seed and their
number, so they are equal for all combinations; later ones (TPE) also depend on earlier trials. A
tuning that goes on therefore repeats the trials of the record, which are not trained again.
"""

import math
from dataclasses import dataclass, replace
from operator import itemgetter

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler

from benchmarks.harness.runner import Measure
from benchmarks.harness.runs import Choice, Combination, Jobs
from benchmarks.harness.study import Space, StudyError, Tuning
from dynlora.report.wording import lower_is_better


@dataclass(frozen=True, slots=True)
class OptunaTuner:
    """Tunes the combinations of a study."""

    jobs: Jobs
    tuning: Tuning

    def tune(self, combination: Combination, measure: Measure) -> Choice:
        """Return the best choice of all trials, the first if several are equal.

        Raises:
            StudyError: If a trial failed, or training diverged in all trials.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        defaults = self.jobs.defaults(combination)
        lower = lower_is_better(self.jobs.metric(combination))
        search = optuna.create_study(direction="minimize" if lower else "maximize")
        spaces = self._spaces()
        search.enqueue_trial({name: getattr(defaults, name) for name in spaces})
        ended: list[tuple[float, Choice]] = []
        for number in range(self.tuning.trials):
            search.sampler = TPESampler(seed=self.tuning.seed + number)
            trial = search.ask(spaces)
            choice = replace(defaults, **trial.params)
            value = measure(number, choice)
            if value is None:
                raise StudyError(
                    f"{combination.name} is not tuned: {number} of {self.tuning.trials} trials "
                    "have ended"
                )
            found = value if math.isfinite(value) else math.inf if lower else -math.inf
            search.tell(trial, found)
            ended.append((found if lower else -found, choice))
        loss, best = min(ended, key=itemgetter(0))
        if math.isinf(loss):
            raise StudyError(
                f"{combination.name} cannot be tuned: training diverged in all of its "
                f"{self.tuning.trials} trials"
            )
        return best

    def _spaces(self) -> dict[str, BaseDistribution]:
        named = {"learning_rate": self.tuning.learning_rate, "scale": self.tuning.scale}
        return {name: _distribution(space) for name, space in named.items() if space is not None}


def _distribution(space: Space) -> BaseDistribution:
    if space.is_range:
        return FloatDistribution(space.low, space.high, log=True)
    return CategoricalDistribution(space.choices)
