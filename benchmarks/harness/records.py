"""The folder of records: one JSON a run, written whole, found by its key when the study goes on."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness.assignment import Outcome
from benchmarks.harness.runs import Cell, Run, key_of, plain
from benchmarks.harness.study import Study
from dynlora.errors import RunFileError
from dynlora.files.json_files import read_json, write_json

logger = logging.getLogger(__name__)

NEEDED = (
    "study", "kind", "model", "task", "method", "budget", "seed", "status", "diverged", "config",
)  # fmt: skip
"""Keys without which a file is no record."""
ASIDE = ".superseded"
"""Ending of a record that was put aside: it is kept, but read by nobody."""
EMPTY: Mapping[str, Any] = {
    "main_metric": None,
    "validation": None,
    "test": None,
    "collapsed": None,
    "majority": None,
    "parameters": None,
    "seconds": None,
    "peak_memory_bytes": None,
    "initial_ranks": {},
    "final_ranks": {},
    "steps": None,
    "versions": None,
    "machine": None,
}
"""What a run that did not complete has found."""


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one study."""

    study: Study
    _found: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = field(default_factory=dict)
    """By kind and key, as a run's configuration is understood today."""

    def ended(self, run: Run) -> dict[str, Any] | None:
        """Return the record of a run that need not be done again; None if it is to be done.

        A trial in which training diverged has said all that a trial can say.
        """
        _, record = self._found.get((run.kind, run.key), (None, None))
        if record is None:
            return None
        diverged = run.kind == "trial" and record["diverged"]
        return record if record["status"] == "completed" or diverged else None

    def status(self, run: Run) -> str | None:
        """Return what became of a run when it was last tried; None if it never was."""
        _, record = self._found.get((run.kind, run.key), (None, None))
        return None if record is None else str(record["status"])

    def status_at(self, cell: Cell, seed: int) -> str | None:
        """Return what became of a final run, whatever was tuned for it; None if it is not there."""
        place = (cell.model, cell.task, cell.method, cell.budget, seed)
        for _, record in self._found.values():
            if record["kind"] == "final" and _place(record) == place:
                return str(record["status"])
        return None

    def trials(self, cell: Cell) -> int:
        """Return how many trials of a cell have ended, whatever their settings."""
        place = (cell.model, cell.task, cell.method, cell.budget)
        return sum(
            record["kind"] == "trial"
            and _place(record)[:-1] == place
            and (record["status"] == "completed" or record["diverged"])
            for _, record in self._found.values()
        )

    def write(self, run: Run, outcome: Outcome) -> dict[str, Any]:
        """Write what became of a run, in the place of what was known of it, and return that."""
        record = as_record(self.study, run, outcome)
        cell = run.cell
        name = f"{cell.model}-{cell.task}-{cell.method}-r{cell.budget}-s{run.seed}"
        path = self.study.results / f"{run.kind}-{name}-{run.key}.json"
        self.study.results.mkdir(parents=True, exist_ok=True)
        before = self._found.get((run.kind, run.key), (path, {}))[0]
        write_json(path, record)
        if before != path:
            before.unlink(missing_ok=True)
        self._found[run.kind, run.key] = path, record
        return record

    def put_aside(self, run: Run) -> None:
        """Put records of the same final run under other keys aside: it shall stand there once."""
        cell = run.cell
        mine = (cell.model, cell.task, cell.method, cell.budget, run.seed)
        for (kind, key), (path, record) in list(self._found.items()):
            if kind == run.kind == "final" and key != run.key and _place(record) == mine:
                path.replace(path.with_name(path.name + ASIDE))
                del self._found[kind, key]


def _place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("model", "task", "method", "budget", "seed"))


def open_records(study: Study) -> Records:
    """Read the records of a study; there may be none yet.

    Raises:
        RunFileError: If a file in the folder is not a record.
    """
    records = Records(study)
    if study.results.exists() and not study.results.is_dir():
        raise RunFileError(
            f"`results` of {study.file} must be a folder, got {study.results}, which is a file: "
            "name another."
        )
    for path in sorted(study.results.glob("*.json")):
        record = read_json(path)
        missing = [key for key in NEEDED if key not in record]
        if missing:
            raise RunFileError(
                f"each .json file in {study.results} must be the record of a run, got "
                f"{path.name}, which has no `{missing[0]}`: move it elsewhere."
            )
        if record["study"] == study.name:
            records._found[record["kind"], _key_today(record)] = path, record
    return records


def _key_today(record: Mapping[str, Any]) -> str:
    """Return the key that a record's configuration has now, with settings that are new since."""
    return key_of(record["config"], record.get("exam"))


def as_record(study: Study, run: Run, outcome: Outcome) -> dict[str, Any]:
    """Return the record of a run, as it is written."""
    return {
        "study": study.name,
        "description": study.description,
        "kind": run.kind,
        "key": run.key,
        "model": run.cell.model,
        "task": run.cell.task,
        "method": run.cell.method,
        "budget": run.cell.budget,
        "seed": run.seed,
        "trial": run.trial,
        "status": outcome.status,
        "error": outcome.error,
        "diverged": outcome.diverged,
        "notes": list(outcome.notes),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "tuned": None if run.tuned is None else asdict(run.tuned),
        "exam": None if run.exam is None else asdict(run.exam),
        "config": plain(run.config),
        **EMPTY,
        **(outcome.values or {}),
    }
