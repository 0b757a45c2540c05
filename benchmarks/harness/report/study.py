"""Step 2. A study: its records in order, found by cell, method and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.report.record import Cell, Outcome, Record
from dynlora.errors import RunFileError


@dataclass(frozen=True, slots=True)
class Study:
    """All records of one name."""

    name: str
    records: tuple[Record, ...]
    """In the order of cell, method, kind, seed and file."""
    _runs: Mapping[tuple[Cell, str], Sequence[Record]] = field(init=False, repr=False)
    """Final runs by cell and method: they are asked for often."""

    def __post_init__(self) -> None:
        """Find the final runs of each cell and method."""
        found: dict[tuple[Cell, str], list[Record]] = {}
        for record in self.finals:
            found.setdefault((record.cell, record.method), []).append(record)
        object.__setattr__(self, "_runs", found)

    @property
    def descriptions(self) -> list[str]:
        """What the study asks; more than one text where it was changed between runs."""
        return sorted({record.description for record in self.records if record.description})

    @property
    def finals(self) -> tuple[Record, ...]:
        """The runs that count, whatever became of them."""
        return tuple(record for record in self.records if record.kind == "final")

    @property
    def cells(self) -> list[Cell]:
        """What final runs were made of, in order."""
        return sorted({record.cell for record in self.finals})

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Model and task of all cells, in order."""
        return sorted({(cell.model, cell.task) for cell in self.cells})

    def budgets(self, setting: tuple[str, str]) -> list[Cell]:
        """Return the cells of a model and task, in the order of the budget."""
        return [cell for cell in self.cells if (cell.model, cell.task) == setting]

    def methods(self, *, first: str) -> list[str]:
        """Return the methods of all final runs in alphabetical order, but for the one named."""
        found = sorted({record.method for record in self.finals})
        return sorted(found, key=lambda method: method != first)

    def runs(self, cell: Cell, method: str) -> Sequence[Record]:
        """Return the final runs of a method in a cell, in the order of the seed."""
        return self._runs.get((cell, method), ())

    def usable(self, cell: Cell, method: str) -> Mapping[int, Outcome]:
        """Return the outcomes that can be averaged, by seed: completed, and finite."""
        found = ((run.seed, run.outcome) for run in self.runs(cell, method))
        return {seed: outcome for seed, outcome in found if outcome and outcome.is_finite}

    def not_finite(self, cell: Cell, method: str) -> list[int]:
        """Return the seeds of runs that completed with a loss or metric that is no number."""
        return [
            run.seed for run in self.runs(cell, method) if run.outcome and not run.outcome.is_finite
        ]

    def metric(self, setting: tuple[str, str]) -> str:
        """Return the main metric of a model and task; `metric` where no run has completed."""
        cells = self.budgets(setting)
        found = [r.outcome.main_metric for r in self.finals if r.outcome and r.cell in cells]
        return found[0] if found else "metric"


def group(records: Sequence[Record]) -> list[Study]:
    """Return the studies of all records, in the order of their names.

    Raises:
        RunFileError: If two studies have one name, or two records are of one run.
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
