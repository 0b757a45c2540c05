"""Steps 1 and 2. Read and check records, and group them by study, cell, method and seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StrictBool, StrictInt

from benchmarks.harness.checked import check
from benchmarks.harness.records import RecordFiles
from benchmarks.harness.runs import Choice
from benchmarks.harness.tables import RUNS, SHARED
from dynlora.errors import RunFileError

Status = Literal["completed", "failed", "out_of_memory", "interrupted", "running"]
STATUSES: tuple[str, ...] = get_args(Status)


def _as_number(value: Any) -> float:
    """Convert a number of a record, where null stands for a non-finite number."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise ValueError("must be a number or null")
    return float(value) if abs(value) < math.inf else math.nan


def _check_name(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("must be a name of printable characters")
    return name


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text).strip()


Number = Annotated[float, BeforeValidator(_as_number)]
Name = Annotated[str, AfterValidator(_check_name)]
Text = Annotated[str, BeforeValidator(lambda text: text or ""), AfterValidator(_printable)]
"""Null becomes an empty text; unprintable characters become spaces."""
Count = Annotated[StrictInt, Field(ge=0)]


class AdapterSize(BaseModel, frozen=True):
    """Adapter parameters of a run."""

    end: Count
    peak: Count


class Scores(BaseModel, frozen=True):
    """Results of a completed run, as in its record; NaN for a non-finite number."""

    main_metric: Name
    validation: dict[str, Number]
    """Values by metric."""
    test: dict[str, Number] | None
    parameters: AdapterSize
    final_ranks: dict[str, Count]
    collapsed: StrictBool | None = None
    """Whether all predictions were the same class; None if not checked."""

    @property
    def loss(self) -> float:
        """Validation loss."""
        return self.validation["loss"]

    @property
    def metric(self) -> float:
        """Main metric on validation data."""
        return self.validation[self.main_metric]

    @property
    def is_finite(self) -> bool:
        """Whether all losses and main metrics are finite."""
        splits = (self.validation, self.test or {})
        names = ("loss", self.main_metric)
        return all(math.isfinite(split[name]) for split in splits if split for name in names)


class RecordedRun(BaseModel, frozen=True):
    """Description of a run in its record."""

    study: Name
    description: Text = ""
    """Question of the study, in Markdown; may be empty."""
    kind: Literal["final", "trial"]
    model: Name
    task: Name
    method: Name
    budget: Count
    seed: Count
    status: Status
    error: Text = ""
    diverged: StrictBool = False
    """Whether the run failed because of a non-finite loss or gradient."""
    tuned: dict[str, Number] | None = None


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """Model, task and budget, which comparable runs share."""

    model: str
    task: str
    budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run of a study with its scores."""

    path: Path
    """Table of the study with the kind and key of the run appended, for messages."""
    run: RecordedRun
    cell: Cell
    tuned: Choice | None
    scores: Scores | None
    """None unless the run is final and completed."""


def read_result(path: Path, values: Mapping[str, Any]) -> Result:
    """Check the values of a record.

    Args:
        path: Place of the record, for messages.
        values: Its values; only a completed final run needs scores.

    Raises:
        RunFileError: If a key is missing or has an invalid value.
    """
    run = check(RecordedRun, values, path, RunFileError)
    is_measured = run.kind == "final" and run.status == "completed"
    scores = check(Scores, {"test": None, **values}, path, RunFileError) if is_measured else None
    if scores is not None:
        _check_metrics(path, scores)
    return Result(
        path=path,
        run=run,
        cell=Cell(run.model, run.task, run.budget),
        tuned=_choice(path, run.tuned),
        scores=scores,
    )


def _check_metrics(path: Path, scores: Scores) -> None:
    splits = {"validation": scores.validation, "test": scores.test}
    for split, found in splits.items():
        for name in ("loss", scores.main_metric):
            if found is not None and name not in found:
                raise RunFileError(f"`{split}.{name}` must be given, but got nothing ({path}).")


def _choice(path: Path, tuned: Mapping[str, float] | None) -> Choice | None:
    if tuned is None:
        return None
    for key in ("learning_rate", "scale"):
        if key not in tuned:
            raise RunFileError(f"`tuned.{key}` must be given, but got nothing ({path}).")
    return Choice(learning_rate=tuned["learning_rate"], scale=tuned["scale"])


@dataclass(frozen=True, slots=True)
class StudyResults:
    """All results of a study."""

    name: str
    results: tuple[Result, ...]
    """Sorted by cell, method, kind, seed and file."""
    _runs: Mapping[tuple[Cell, str], Sequence[Result]] = field(init=False, repr=False)
    """Final runs by cell and method, cached."""

    def __post_init__(self) -> None:
        """Group the final runs by cell and method."""
        found: dict[tuple[Cell, str], list[Result]] = {}
        for result in self.finals:
            found.setdefault((result.cell, result.run.method), []).append(result)
        object.__setattr__(self, "_runs", found)

    @property
    def descriptions(self) -> list[str]:
        """Distinct descriptions in the records, sorted."""
        return sorted({r.run.description for r in self.results if r.run.description})

    @property
    def finals(self) -> tuple[Result, ...]:
        """The final runs, with any status."""
        return tuple(result for result in self.results if result.run.kind == "final")

    @property
    def cells(self) -> list[Cell]:
        """Cells of the final runs, sorted."""
        return sorted({result.cell for result in self.finals})

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Model and task of all cells, sorted."""
        return sorted({(cell.model, cell.task) for cell in self.cells})

    def budgets(self, setting: tuple[str, str]) -> list[Cell]:
        """Return the cells of a model and task, by budget."""
        return [cell for cell in self.cells if (cell.model, cell.task) == setting]

    def methods(self, *, first: str) -> list[str]:
        """Return the methods of all final runs: `first`, then the others alphabetically."""
        found = sorted({result.run.method for result in self.finals})
        return sorted(found, key=lambda method: method != first)

    def runs(self, cell: Cell, method: str) -> Sequence[Result]:
        """Return the final runs of a method in a cell, by seed."""
        return self._runs.get((cell, method), ())

    def usable(self, cell: Cell, method: str) -> Mapping[int, Scores]:
        """Return the scores of completed runs that are finite, by seed."""
        found = ((result.run.seed, result.scores) for result in self.runs(cell, method))
        return {seed: scores for seed, scores in found if scores and scores.is_finite}

    def not_finite(self, cell: Cell, method: str) -> list[int]:
        """Return the seeds of completed runs with a non-finite loss or metric."""
        runs = self.runs(cell, method)
        return [r.run.seed for r in runs if r.scores and not r.scores.is_finite]

    def metric(self, setting: tuple[str, str]) -> str:
        """Return the main metric of a model and task; `metric` if no run has completed."""
        cells = self.budgets(setting)
        found = [r.scores.main_metric for r in self.finals if r.scores and r.cell in cells]
        return found[0] if found else "metric"


def read_results(places: Sequence[Path]) -> list[Result]:
    """Return the results of single studies or of all studies in folders, each study once.

    Args:
        places: Folders of results, or tables of runs.

    Raises:
        RunFileError: If a place contains no records, or a file is damaged.
    """
    found: dict[Path, RecordFiles] = {}
    for place in places:
        for study in _studies(place):
            files = RecordFiles(place if place.is_dir() else place.parent, study)
            found.setdefault(files.of(RUNS).resolve(), files)
    return [
        read_result(files.of(RUNS) / f"{record['kind']}-{record['key']}", record)
        for files in found.values()
        for record in files.read()
    ]


def _studies(place: Path) -> list[str]:
    """Return the names of the studies at a place, ignoring other files."""
    if place.is_dir():
        folder, pattern = place, "*"
    elif place.name.endswith(RUNS):
        folder, pattern = place.parent, place.name.removesuffix(RUNS)
    else:
        raise RunFileError(
            f"RESULTS must be a folder or the {RUNS} file of a study, but got {place}, which "
            f"{'is neither' if place.exists() else 'does not exist'}. Run a study first."
        )
    names = {
        path.name.removesuffix(ending)
        for ending in (SHARED, ".parts", ".pending")
        for path in folder.glob(f"{pattern}{ending}")
    }
    if not names:
        raise RunFileError(
            f"RESULTS must contain the tables of a study, but got {place}, which has none. Run a "
            "study first."
        )
    return sorted(names)


def group(results: Sequence[Result]) -> list[StudyResults]:
    """Group results by study, sorted by name.

    Raises:
        RunFileError: If two studies have the same name, two records are of the same run, or the
            main metrics of a task differ.
    """
    by_name: dict[str, list[Result]] = {}
    for result in sorted(results, key=_order):
        by_name.setdefault(result.run.study, []).append(result)
    studies = [StudyResults(name, tuple(by_name[name])) for name in sorted(by_name)]
    for study in studies:
        _check_one_folder(study)
        _check_once(study)
        _check_one_metric(study)
    return studies


def _order(result: Result) -> tuple[Cell, str, str, int, str]:
    run = result.run
    return result.cell, run.method, run.kind, run.seed, result.path.name


def _check_one_folder(study: StudyResults) -> None:
    folders = sorted({result.path.parent for result in study.results})
    if len(folders) > 1:
        raise RunFileError(
            f"study {study.name!r} must have one table of runs, but got {folders[0]} and "
            f"{folders[1]}. Rename one study, or report on one folder at a time."
        )


def _check_once(study: StudyResults) -> None:
    seen: dict[tuple[Cell, str, int], Path] = {}
    for result in study.finals:
        cell, run = result.cell, result.run
        first = seen.setdefault((cell, run.method, run.seed), result.path)
        if first != result.path:
            raise RunFileError(
                f"study {study.name!r} must have one final record per run, but got {first} and "
                f"{result.path} for {run.method}, {cell.model}, {cell.task}, budget "
                f"{cell.budget}, seed {run.seed}. Move the older one away."
            )


def _check_one_metric(study: StudyResults) -> None:
    seen: dict[tuple[str, str], tuple[str, Path]] = {}
    for result in study.finals:
        if result.scores is None:
            continue
        found = (result.scores.main_metric, result.path)
        first = seen.setdefault((result.cell.model, result.cell.task), found)
        if first[0] != found[0]:
            raise RunFileError(
                f"runs of {result.cell.task} in study {study.name!r} must have one main metric, "
                f"but got {first[0]} in {first[1]} and {found[0]} in {found[1]}. Move the older "
                "records away."
            )
