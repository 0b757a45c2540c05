"""Resolve every combination of a study to a run with its job and key.

The key is a hash of everything that affects a run's result. It contains the study's placeholders
instead of this machine's folders.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from itertools import product
from typing import Any, get_type_hints

from benchmarks.harness.study import Fragment, Study
from dynlora.errors import ConfigError
from dynlora.train.config import METRICS, JobConfig
from dynlora.train.config_file import make_job

NOWHERE = "runs/of-a-study"
"""Placeholder for the folder of a run."""
COSMETIC = (
    ("overwrite",), ("training", "resume"), ("training", "report_to"),
    ("training", "logging_steps"), ("training", "save_total_limit"), ("training", "eval_on_start"),
)  # fmt: skip
"""Keys that do not affect a run's result."""
KEY_LENGTH = 12


def merge(*fragments: Fragment) -> dict[str, Any]:
    """Merge fragments: sections recursively, other values from the last fragment."""
    merged: dict[str, Any] = {}
    for fragment in fragments:
        for key, value in fragment.items():
            below = merged.get(key)
            both = isinstance(value, Mapping) and isinstance(below, Mapping)
            merged[key] = merge(below or {}, value) if both else value
    return merged


@dataclass(frozen=True, slots=True, order=True)
class Combination:
    """Model, task, method and budget, which are tuned together."""

    model: str
    task: str
    method: str
    budget: int

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.model}/{self.task}/{self.method}/r{self.budget}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Settings chosen by tuning."""

    learning_rate: float
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamRows:
    """Rows for the evaluation at the end of a run."""

    split: str
    max_rows: int | None


@dataclass(frozen=True, slots=True)
class Run:
    """One run."""

    kind: str
    """`final`, or `trial` for tuning."""
    combination: Combination
    seed: int
    config: JobConfig
    """Job without output folder, and with placeholders for this machine's folders."""
    tuned: Choice | None
    exam: ExamRows | None
    trial: int | None = None
    """Number of the trial in its combination."""

    @property
    def name(self) -> str:
        """Name in messages and for `--only`."""
        last = f"s{self.seed}" if self.trial is None else f"t{self.trial}"
        return f"{self.combination.name}/{last}"

    @property
    def key(self) -> str:
        """Hash of everything that affects the result."""
        return key_of(plain(self.config), None if self.exam is None else asdict(self.exam))


@dataclass(frozen=True, slots=True)
class Jobs:
    """The resolved jobs of a study."""

    study: Study
    configs: Mapping[tuple[str, str, str], JobConfig]
    """Jobs from the fragments, by model, task and method."""

    def combinations(self) -> list[Combination]:
        """Return all combinations, in tuning order."""
        study = self.study
        parts = product(study.models, study.tasks, study.budgets, study.methods)
        return [Combination(model, task, method, budget) for model, task, budget, method in parts]

    def defaults(self, combination: Combination) -> Choice:
        """Return a combination's learning rate and scale before tuning."""
        rate = self.config(combination).training.learning_rate
        return Choice(learning_rate=rate, scale=self.study.scale)

    def final(self, combination: Combination, seed: int, tuned: Choice | None) -> Run:
        """Return a final run."""
        exam = self.study.evaluate
        rows = None
        if exam is not None:
            rows = ExamRows(split=exam.split_of(combination.task), max_rows=exam.max_rows)
        config = self._resolve(combination, seed, tuned or self.defaults(combination))
        return Run("final", combination, seed, config, tuned, rows)

    def trial(self, combination: Combination, seed: int, number: int, choice: Choice) -> Run:
        """Return a trial, which has no exam."""
        config = self._resolve(combination, seed, choice)
        return Run("trial", combination, seed, config, choice, None, number)

    def metric(self, combination: Combination) -> str:
        """Return the name of the validation metric that tuning optimizes."""
        chosen = None if self.study.tune is None else self.study.tune.metric
        return chosen or METRICS[self.config(combination).task][0]

    def config(self, combination: Combination) -> JobConfig:
        """Return the job of a combination without its budget, scale and seed."""
        return self.configs[combination.model, combination.task, combination.method]

    def _resolve(self, combination: Combination, seed: int, choice: Choice) -> JobConfig:
        config, alpha = self.config(combination), choice.scale * combination.budget
        return replace(
            config,
            lora=replace(config.lora, r=combination.budget, lora_alpha=alpha),
            # Controls with random ranks must draw other ranks per seed.
            dynamic=replace(config.dynamic, seed=seed),
            training=replace(config.training, seed=seed, learning_rate=choice.learning_rate),
        )


def _check_tuning(study: Study, config: JobConfig) -> None:
    """Check that the search spaces contain the defaults and the task has the metric."""
    tuning = study.tune
    if tuning is None:
        return
    for key, space, default in (
        ("learning_rate", tuning.learning_rate, config.training.learning_rate),
        ("scale", tuning.scale, study.scale),
    ):
        if space is not None and not space.contains(default):
            found = list(space.choices)
            raise ConfigError(
                f"`tune.{key}` must contain the default, {default:g}, which is the first trial, "
                f"but got {found}. Widen it, or change the default"
            )
    known = METRICS[config.task]
    if tuning.metric is not None and tuning.metric not in known:
        raise ConfigError(
            f"`tune.metric` must be a metric of `task: {config.task}`, one of {', '.join(known)}, "
            f"but got {tuning.metric}"
        )


def resolve_jobs(study: Study) -> Jobs:
    """Resolve and check all jobs of a study.

    Raises:
        ConfigError: If a job is invalid; the message names the study's file and entries.
    """
    configs = {}
    for model, task, method in product(study.models, study.tasks, study.methods):
        parts = (study.base, study.models[model], study.tasks[task], study.methods[method])
        made_of = f"model {model}, task {task} and method {method} of {study.file}"
        try:
            config = make_job(merge({"output": NOWHERE}, *parts))
            _check_exam(study, task, config)
            configs[model, task, method] = config
            _check_tuning(study, config)
            for budget in study.budgets:
                Jobs(study, configs).final(Combination(model, task, method, budget), 0, None)
        except ConfigError as error:
            raise ConfigError(f"{str(error).removesuffix('.')} ({made_of}).") from error
    return Jobs(study, configs)


def _check_exam(study: Study, task: str, config: JobConfig) -> None:
    """Check that test rows are not used for training or selection."""
    if study.evaluate is None:
        return
    split, data = study.evaluate.split_of(task), config.data
    used = [data.train_split]
    if data.validation_rows_from_train is None:
        used.append(data.validation_split)
    if split in used:
        raise ConfigError(
            f"`evaluate.split` must be none of the splits that a run uses, {', '.join(used)}, "
            f"but got {split}. Name another, or set `data.validation_rows_from_train` so that "
            "`data.validation_split` is left for the test"
        )


def plain(config: JobConfig) -> dict[str, Any]:
    """Return a job's configuration as JSON values, without its output folder."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))  # tuples become lists
    del values["output"], values["overwrite"]
    return values


def key_of(config: Mapping[str, Any], test: Mapping[str, Any] | None) -> str:
    """Return the key of a run from the result of `plain` and the rows of its exam.

    Missing settings count as defaults, so that records stay valid when dynlora adds a setting.
    """
    values = merge(_defaults(), config)
    for *sections, last in COSMETIC:
        inside = values
        for section in sections:
            inside = inside[section]
        inside.pop(last, None)
    text = json.dumps({"config": values, "test": test}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@cache
def _defaults() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dict(_section_defaults(JobConfig))))
    return values


def _section_defaults(kind: Any) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield field.name, dict(_section_defaults(hints[field.name]))
        elif field.default is not MISSING:
            yield field.name, field.default
