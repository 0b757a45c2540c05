"""Step 2. Group records by study, cell, method and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.report.record import Cell, Outcome, Record
from dynlora.errors import RunFileError


@dataclass(frozen=True, slots=True)
class Study:
    """All records of a study."""

    name: str
    records: tuple[Record, ...]
    """Sorted by cell, method, kind, seed and file."""
    _runs: Mapping[tuple[Cell, str], Sequence[Record]] = field(init=False, repr=False)
    """Final runs by cell and method, cached."""

    def __post_init__(self) -> None:
        """Group the final runs by cell and method."""
        found: dict[tuple[Cell, str], list[Record]] = {}
        for record in self.finals:
            found.setdefault((record.cell, record.method), []).append(record)
        object.__setattr__(self, "_runs", found)

    @property
    def descriptions(self) -> list[str]:
        """Distinct descriptions in the records, sorted."""
        return sorted({record.description for record in self.records if record.description})

    @property
    def finals(self) -> tuple[Record, ...]:
        """The final runs, with any status."""
        return tuple(record for record in self.records if record.kind == "final")

    @property
    def cells(self) -> list[Cell]:
        """Cells of the final runs, sorted."""
        return sorted({record.cell for record in self.finals})

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Model and task of all cells, sorted."""
        return sorted({(cell.model, cell.task) for cell in self.cells})

    def budgets(self, setting: tuple[str, str]) -> list[Cell]:
        """Return the cells of a model and task, by budget."""
        return [cell for cell in self.cells if (cell.model, cell.task) == setting]

    def methods(self, *, first: str) -> list[str]:
        """Return the methods of all final runs: `first`, then the others alphabetically."""
        found = sorted({record.method for record in self.finals})
        return sorted(found, key=lambda method: method != first)

    def runs(self, cell: Cell, method: str) -> Sequence[Record]:
        """Return the final runs of a method in a cell, by seed."""
        return self._runs.get((cell, method), ())

    def usable(self, cell: Cell, method: str) -> Mapping[int, Outcome]:
        """Return the completed, finite outcomes, by seed."""
        found = ((run.seed, run.outcome) for run in self.runs(cell, method))
        return {seed: outcome for seed, outcome in found if outcome and outcome.is_finite}

    def not_finite(self, cell: Cell, method: str) -> list[int]:
        """Return the seeds of completed runs with a non-finite loss or metric."""
        return [
            run.seed for run in self.runs(cell, method) if run.outcome and not run.outcome.is_finite
        ]

    def metric(self, setting: tuple[str, str]) -> str:
        """Return the main metric of a model and task; `metric` if no run has completed."""
        cells = self.budgets(setting)
        found = [r.outcome.main_metric for r in self.finals if r.outcome and r.cell in cells]
        return found[0] if found else "metric"


def group(records: Sequence[Record]) -> list[Study]:
    """Group records into studies, sorted by name.

    Raises:
        RunFileError: If two studies have the same name, two records are of the same run, or the
            main metrics of a task differ.
    """
    by_name: dict[str, list[Record]] = {}
    for record in sorted(records, key=_order):
        by_name.setdefault(record.study, []).append(record)
    studies = [Study(name, tuple(by_name[name])) for name in sorted(by_name)]
    for study in studies:
        _check_one_folder(study)
        _check_once(study)
        _check_one_metric(study)
    return studies


def _order(record: Record) -> tuple[Cell, str, str, int, str]:
    return record.cell, record.method, record.kind, record.seed, record.path.name


def _check_one_folder(study: Study) -> None:
    folders = sorted({record.path.parent for record in study.records})
    if len(folders) > 1:
        raise RunFileError(
            f"study {study.name!r} must have one table of runs, got {folders[0]} and "
            f"{folders[1]}: rename one study, or report on one folder at a time."
        )


def _check_once(study: Study) -> None:
    seen: dict[tuple[Cell, str, int], Path] = {}
    for run in study.finals:
        first = seen.setdefault((run.cell, run.method, run.seed), run.path)
        if first != run.path:
            raise RunFileError(
                f"study {study.name!r} must have one final record of each run, got {first} and "
                f"{run.path} for {run.method}, {run.cell.model}, {run.cell.task}, budget "
                f"{run.cell.budget}, seed {run.seed}: move the one that is out of date away."
            )


def _check_one_metric(study: Study) -> None:
    seen: dict[tuple[str, str], Record] = {}
    for run in (run for run in study.finals if run.outcome):
        first = seen.setdefault((run.cell.model, run.cell.task), run)
        names = [r.outcome.main_metric for r in (first, run) if r.outcome]
        if len(set(names)) > 1:
            raise RunFileError(
                f"runs of {run.cell.task} in study {study.name!r} must have one main metric, got "
                f"{names[0]} in {first.path} and {names[1]} in {run.path}: move the records that "
                "are out of date away."
            )
