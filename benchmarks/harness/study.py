"""Read and check a study's file: models, tasks, methods, budgets, seeds and tuning."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.fields import Fields
from benchmarks.harness.fragments import Fragment, check_free
from dynlora.errors import ConfigError
from dynlora.files.plain_values import parse_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
"""Valid names of models, tasks and methods, which become part of file names."""
KEYS = (
    "description", "results", "models", "tasks", "methods", "budgets", "seeds", "base", "scale",
    "tune", "evaluate",
)  # fmt: skip
TUNE_KEYS = ("trials", "seed", "learning_rate", "scale", "metric")
EVALUATE_KEYS = ("split", "splits", "max_rows")

CheckKeys = Callable[[Fragment, str], None]
"""Raises ConfigError if a fragment contains an unknown key; the second argument is its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Search space of a value: a range or a list of choices."""

    low: float
    high: float
    choices: tuple[float, ...] = ()
    """All values to try; empty to sample the range log-uniformly."""

    def holds(self, value: float) -> bool:
        """Return whether the space contains a value."""
        return value in self.choices if self.choices else self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """How to tune each method, equally for every model, task and budget."""

    trials: int
    """Number of trials, including one with the defaults."""
    seed: int
    """Training seed of the trials and seed of the sampler."""
    learning_rate: Space | None
    """None keeps the fragments' value."""
    scale: Space | None
    """`lora_alpha` divided by `r`; None keeps the study's value."""
    metric: str | None
    """Validation metric to optimize; None uses the task's main metric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """Rows for a single evaluation after each final run."""

    split: str
    """Split of tasks that are not in `splits`."""
    splits: Mapping[str, str]
    """Split by task."""
    max_rows: int | None
    """Maximum number of rows, a fixed sample; None uses all."""

    def of(self, task: str) -> str:
        """Return the split of a task."""
        return self.splits.get(task, self.split)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A checked study."""

    name: str
    """File name without ending."""
    file: Path
    description: str
    results: Path
    """Folder of the tables, relative to the working folder."""
    models: Mapping[str, Fragment]
    tasks: Mapping[str, Fragment]
    methods: Mapping[str, Fragment]
    budgets: tuple[int, ...]
    """Values of `lora.r`."""
    seeds: tuple[int, ...]
    """Training seeds of the final runs."""
    base: Fragment
    """Configuration shared by all jobs."""
    scale: float
    """`lora_alpha` divided by `lora.r`, unless tuned."""
    tuning: Tuning | None
    exam: Exam | None


def read_study(path: Path, check_keys: CheckKeys) -> Study:
    """Read and check a study.

    Args:
        path: YAML file of the study.
        check_keys: Checks the keys of a job's configuration.

    Raises:
        ConfigError: If the file is invalid; the message names the key and its valid values.
    """
    fields = Fields(_load(path), path)
    fields.check_known(KEYS)
    parts = {key: _fragments(fields, key, check_keys) for key in ("models", "tasks", "methods")}
    base = fields.mapping("base", default={})
    _check_fragment(base, f"base in {path}", check_keys)
    seeds = fields.whole_numbers("seeds", low=0)
    tune, evaluate = fields.section("tune"), fields.section("evaluate")
    return Study(
        name=path.stem,
        file=path,
        description=fields.text("description", default=""),
        results=Path(fields.text("results")),
        models=parts["models"],
        tasks=parts["tasks"],
        methods=parts["methods"],
        budgets=fields.whole_numbers("budgets", low=1),
        seeds=seeds,
        base=base,
        scale=fields.number("scale", default=2.0),
        tuning=None if tune is None else _tuning(tune, seeds),
        exam=None if evaluate is None else _exam(evaluate, parts["tasks"]),
    )


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"STUDY must be a YAML file, got {path}, which is not a file.")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"STUDY must be a YAML file, got {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"STUDY must hold keys and values, got {path} without any.")
    if NAME.fullmatch(path.stem) is None:
        raise ConfigError(
            f"a study is called as its file is, which must be made of letters, digits and _.+-, "
            f"got {path.stem!r}: rename {path}."
        )
    return content


def _fragments(fields: Fields, key: str, check_keys: CheckKeys) -> Mapping[str, Fragment]:
    found = fields.mapping(key)
    if not found:
        raise fields.wrong(key, "at least one entry, `name: {keys of a job}`", found)
    inside = Fields(found, fields.file, f"{key}.")
    for name in found:
        if NAME.fullmatch(str(name)) is None:
            raise fields.wrong(key, "names made of letters, digits and _.+-", repr(name))
        place = f"{key}.{name} in {fields.file}"
        _check_fragment(inside.mapping(name), place, check_keys)
    return {str(name): fragment for name, fragment in found.items()}


def _check_fragment(fragment: Fragment, place: str, check_keys: CheckKeys) -> None:
    check_keys(fragment, f" in {place}")
    check_free(fragment, place)


def _tuning(fields: Fields, seeds: tuple[int, ...]) -> Tuning:
    fields.check_known(TUNE_KEYS)
    seed = fields.whole("seed", low=0)
    if seed in seeds:
        raise fields.wrong(
            "seed", f"none of `seeds`, {list(seeds)}, which would be favoured by the choice", seed
        )
    spaces = {key: _space(fields, key) for key in ("learning_rate", "scale")}
    if not any(spaces.values()):
        raise fields.wrong(
            "learning_rate", "given, or `tune.scale`: there is nothing to tune", None
        )
    main = fields.values.get("metric", "loss") is None  # null, not missing
    return Tuning(
        trials=fields.whole("trials", low=1),
        seed=seed,
        learning_rate=spaces["learning_rate"],
        scale=spaces["scale"],
        metric=None if main else fields.text("metric", default="loss"),
    )


def _space(fields: Fields, key: str) -> Space | None:
    """Parse `[low, high]` as a range and `{choices: [...]}` as values."""
    match fields.values.get(key):
        case None:
            return None
        case dict():
            inside = fields.inside(key)
            inside.check_known(("choices",))
            choices = inside.numbers("choices")
            return Space(low=min(choices), high=max(choices), choices=choices)
    ends = fields.numbers(key)
    if len(ends) != 2 or ends[0] >= ends[1]:
        raise fields.wrong(
            key, "[lowest, highest], or {choices: [...]} for values of their own", list(ends)
        )
    return Space(low=ends[0], high=ends[1])


def _exam(fields: Fields, tasks: Mapping[str, Fragment]) -> Exam:
    fields.check_known(EVALUATE_KEYS)
    splits = fields.mapping("splits", default={})
    for task in splits:
        if task not in tasks:
            raise fields.wrong("splits", f"by task, one of {', '.join(tasks)}", task)
    inside = Fields(splits, fields.file, f"{fields.place}splits.")
    rows = fields.values.get("max_rows")
    return Exam(
        split=fields.text("split"),
        splits={task: inside.text(task) for task in splits},
        max_rows=None if rows is None else fields.whole("max_rows", low=1),
    )
