"""Read and check a study's file: models, tasks, methods, budgets, seeds and tuning."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    StrictInt,
    StringConstraints,
    model_validator,
)

from benchmarks.harness.checked import check
from dynlora.errors import ConfigError, DynamicLoraError
from dynlora.files.plain_values import flatten, read_yaml
from dynlora.train.config.keys import check_keys

Fragment = Mapping[str, Any]
"""Part of a job's configuration, nested as in its YAML file."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
"""Valid names of studies, models, tasks and methods, which become part of file names."""
OWN_KEYS = {
    "output": "run folders are temporary, see `--keep-runs`",
    "overwrite": "run folders are temporary, see `--keep-runs`",
    "lora.r": "`budgets` sets it",
    "lora.lora_alpha": "it is `scale` times the budget",
    "training.seed": "`seeds` sets it",
    "dynamic.seed": "`seeds` sets it",
    "training.resume": "every run of a study starts from scratch",
}
"""Keys set by the study, with the reason for messages."""


class StudyError(DynamicLoraError):
    """A study cannot run to its end: no run matches, a method is not tuned, or a run failed."""


def _number(value: Any) -> float:
    """Convert a number above 0; YAML reads 3e-4, without a dot, as a text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError("must be a number above 0")
    return number


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("must be different numbers")
    return values


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("must be a text")
    return text


T = TypeVar("T")
Name = Annotated[str, StringConstraints(pattern=NAME)]
Text = Annotated[str, AfterValidator(_text)]
Number = Annotated[float, BeforeValidator(_number)]
Numbers = Annotated[tuple[Number, ...], Field(min_length=1)]
Count = Annotated[StrictInt, Field(ge=1)]
Seed = Annotated[StrictInt, Field(ge=0)]
Distinct = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_distinct)]
Fragments = Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]


class Space(BaseModel, frozen=True, extra="forbid"):
    """Search space of a value: `[low, high]`, sampled log-uniformly, or `{choices: [...]}`."""

    choices: Numbers
    """Both ends of a range, or all values to try."""
    is_range: bool = False

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            if set(given) != {"choices"}:
                raise ValueError("must be [low, high] or {choices: [...]}")
            return given
        ends = [_number(end) for end in given] if isinstance(given, list) else []
        if len(ends) != 2 or ends[0] >= ends[1]:
            raise ValueError("must be [low, high] or {choices: [...]}")
        return {"choices": ends, "is_range": True}

    @property
    def low(self) -> float:
        """Lowest value."""
        return min(self.choices)

    @property
    def high(self) -> float:
        """Highest value."""
        return max(self.choices)

    def contains(self, value: float) -> bool:
        """Return whether the space contains a value."""
        return self.low <= value <= self.high if self.is_range else value in self.choices


class Tuning(BaseModel, frozen=True, extra="forbid"):
    """How to tune each method, equally for every model, task and budget."""

    trials: Count
    """Number of trials, including one with the defaults."""
    seed: Seed
    """Training seed of the trials and seed of the sampler."""
    learning_rate: Space | None = None
    """None keeps the fragments' value."""
    scale: Space | None = None
    """`lora_alpha` divided by `r`; None keeps the study's value."""
    metric: Text | None = "loss"
    """Validation metric to optimize; None uses the task's main metric."""


class Exam(BaseModel, frozen=True, extra="forbid"):
    """Rows for a single evaluation after each final run."""

    split: Text
    """Split of tasks that are not in `splits`."""
    splits: dict[str, Text] = {}
    """Split by task."""
    max_rows: Count | None = None
    """Maximum number of rows, a fixed sample; None uses all."""

    def split_of(self, task: str) -> str:
        """Return the split of a task."""
        return self.splits.get(task, self.split)


class Study(BaseModel, extra="forbid"):
    """A checked study. Fields are the keys of its file."""

    description: str = ""
    folder: Text = Field(alias="results")
    """Folder of the tables, relative to the working folder; `results` in the file."""
    models: Fragments
    tasks: Fragments
    methods: Fragments
    budgets: Distinct[Count]
    """Values of `lora.r`."""
    seeds: Distinct[Seed]
    """Training seeds of the final runs."""
    base: dict[str, Any] = {}
    """Configuration shared by all jobs."""
    scale: Number = 2.0
    """`lora_alpha` divided by `lora.r`, unless tuned."""
    tune: Tuning | None = None
    evaluate: Exam | None = None
    _file: Path = PrivateAttr()

    @property
    def file(self) -> Path:
        """File of the study."""
        return self._file

    @property
    def results(self) -> Path:
        """Folder of the tables."""
        return Path(self.folder)

    @property
    def name(self) -> str:
        """Name of the file without its ending."""
        return self._file.stem


def read_study(path: Path) -> Study:
    """Read and check a study.

    Raises:
        ConfigError: If the file is invalid; the message names the key and its valid values.
    """
    content = read_yaml(path, "STUDY")
    if re.match(NAME, path.stem) is None:
        raise ConfigError(
            f"STUDY must have a name of letters, digits and _.+-, but got {path.stem!r}. Rename "
            f"{path}."
        )
    study = check(Study, content, path, ConfigError)
    study._file = path
    _check_fragment(study.base, f"base in {path}")
    for section in ("models", "tasks", "methods"):
        for name, fragment in getattr(study, section).items():
            _check_fragment(fragment, f"{section}.{name} in {path}")
    _check_together(study)
    return study


def _check_fragment(fragment: Fragment, place: str) -> None:
    """Check that a fragment contains known keys, and none that the study sets."""
    check_keys(fragment, f"in {place}")
    for key in flatten(fragment):
        if key in OWN_KEYS:
            raise ConfigError(f"`{key}` must not be in {place}: {OWN_KEYS[key]}. Remove it.")


def _check_together(study: Study) -> None:
    """Check values that depend on others."""
    tune, exam = study.tune, study.evaluate
    if tune is not None and tune.seed in study.seeds:
        raise ConfigError(
            f"`tune.seed` must be none of `seeds`, {list(study.seeds)}, but got {tune.seed} "
            f"({study.file}). Tuning would favour that seed."
        )
    if tune is not None and tune.learning_rate is None and tune.scale is None:
        raise ConfigError(
            f"`tune.learning_rate` or `tune.scale` must be given, but got neither ({study.file})."
        )
    for task in exam.splits if exam is not None else ():
        if task not in study.tasks:
            raise ConfigError(
                f"`evaluate.splits` must name tasks, {', '.join(study.tasks)}, but got {task} "
                f"({study.file})."
            )
