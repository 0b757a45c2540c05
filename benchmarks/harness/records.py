"""Records of a study: tables of its runs, and one file per run that ended since.

Each finished run immediately gets its own file, so that several processes can run one study and a
killed process loses nothing. A process moves these files into the tables when it ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.harness.assignment import Outcome
from benchmarks.harness.runs import Combination, Run, key_of, plain
from benchmarks.harness.study import Study
from benchmarks.harness.tables import ENDINGS, SHARED, from_texts, to_texts
from dynlora.errors import RunFileError
from dynlora.files.json_files import read_json, write_json
from dynlora.files.whole import whole_folder
from dynlora.report.wording import shorten

NEEDED = (
    "study", "kind", "key", "model", "task", "method", "budget", "seed", "status", "diverged",
    "config",
)  # fmt: skip
"""Required keys of a record."""
EMPTY: Mapping[str, Any] = dict.fromkeys(
    ("main_metric", "validation", "test", "collapsed", "majority", "parameters", "seconds",
     "peak_memory_bytes", "steps", "versions", "machine")
) | {"initial_ranks": {}, "final_ranks": {}}  # fmt: skip
"""Values of a run that did not complete."""
LONGEST_ERROR = 4000
"""Maximum characters of an error in a record, because quoted values may be huge."""
Identity = tuple[str, str]
"""Kind and key of a run, with the key computed from its configuration by the current code."""


@dataclass(frozen=True, slots=True)
class RecordFiles:
    """Paths of a study's records in the folder of results."""

    results: Path
    study: str

    def of(self, ending: str) -> Path:
        """Return the path with an ending."""
        return self.results / f"{self.study}{ending}"

    @property
    def parts(self) -> Path:
        """Folder with a file per run, until the run is in the tables."""
        return self.of(".parts")

    @property
    def _pending(self) -> Path:  # complete new tables while they replace the old ones
        return self.of(".pending")

    def read(self) -> list[dict[str, Any]]:
        """Return all records, from the tables first, then from the parts.

        Raises:
            RunFileError: If a file is damaged or not a record.
        """
        if not self.parts.exists():
            return self._read_tables()
        with self.lock():  # another process may be merging
            return self.read_locked()

    def lock(self) -> FileLock:
        """Return the lock for changes of the tables."""
        return FileLock(self.of(".lock"))

    def read_locked(self) -> list[dict[str, Any]]:
        """Return all records, as `read` does, while holding the lock."""
        return [*self._read_tables(), *(record for _, record in self.read_parts())]

    def _read_tables(self) -> list[dict[str, Any]]:
        paths = {ending: self._newest(ending) for ending in ENDINGS}
        if not paths[SHARED].exists():
            return []
        try:
            return from_texts({e: path.read_text(encoding="utf-8") for e, path in paths.items()})
        except (OSError, ValueError) as error:
            raise RunFileError(
                f"{', '.join(path.name for path in paths.values())} in {self.results} must be the "
                f"tables of a study's records, but got {error}. Restore them from a copy."
            ) from error

    def _newest(self, ending: str) -> Path:
        path = self.of(ending)
        waiting = self._pending / path.name
        return waiting if waiting.exists() else path

    def read_parts(self) -> list[tuple[Path, dict[str, Any]]]:
        """Return the records in `parts`, with their files.

        Raises:
            RunFileError: If a file is damaged or not a record.
        """
        return [(path, _read_part(path)) for path in sorted(self.parts.glob("*.json"))]

    def replace(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write new tables; if killed, leave either the old or the new ones."""
        self._finish()
        with whole_folder(self._pending) as draft:
            for ending, text in to_texts(records).items():
                (draft / self.of(ending).name).write_text(text, encoding="utf-8")
        self._finish()

    def _finish(self) -> None:
        if self._pending.is_dir():
            for path in list(self._pending.iterdir()):
                path.replace(self.results / path.name)
            self._pending.rmdir()


def _read_part(path: Path) -> dict[str, Any]:
    record = read_json(path)
    missing = [key for key in NEEDED if key not in record]
    if missing:
        raise RunFileError(
            f"each .json file in {path.parent} must be the record of a run, but got {path.name} "
            f"without `{missing[0]}`. Move it elsewhere."
        )
    return record


@dataclass(frozen=True, slots=True)
class Records:
    """Records of one study."""

    study: Study
    _found: dict[Identity, dict[str, Any]] = field(default_factory=dict)

    @property
    def files(self) -> RecordFiles:
        """Paths of the records."""
        return RecordFiles(self.study.results, self.study.name)

    def ended(self, run: Run) -> dict[str, Any] | None:
        """Return the record of a run that need not run again, else None.

        A diverged trial does not run again, because its result is final.
        """
        record = self._found.get((run.kind, run.key))
        if record is None:
            return None
        diverged = run.kind == "trial" and record["diverged"]
        return record if record["status"] == "completed" or diverged else None

    def status(self, run: Run) -> str | None:
        """Return the status of a run's latest attempt; None without one."""
        record = self._found.get((run.kind, run.key))
        return None if record is None else str(record["status"])

    def status_at(self, combination: Combination, seed: int) -> str | None:
        """Return the status of a final run with any tuned settings; None without a record."""
        place = (*astuple(combination), seed)
        found = (r for r in self._found.values() if r["kind"] == "final" and _place(r) == place)
        return next((str(record["status"]) for record in found), None)

    def trials(self, combination: Combination) -> int:
        """Return the number of ended trials of a combination, with any settings."""
        return sum(
            record["kind"] == "trial"
            and _place(record)[:-1] == astuple(combination)
            and (record["status"] == "completed" or record["diverged"])
            for record in self._found.values()
        )

    def write(self, run: Run, outcome: Outcome) -> dict[str, Any]:
        """Write and return a run's record, replacing an earlier one."""
        record = as_record(self.study, run, outcome)
        self.files.parts.mkdir(parents=True, exist_ok=True)
        write_json(self.files.parts / f"{run.kind}-{run.key}.json", record)
        self._found[run.kind, run.key] = record
        return record

    def put_aside(self, runs: Sequence[Run]) -> None:
        """Move records of the same final runs with other keys into the folder `.superseded`."""
        mine = {(*astuple(run.combination), run.seed): run.key for run in runs}
        old = {
            (kind, key): record
            for (kind, key), record in self._found.items()
            if kind == "final" and mine.get(_place(record), key) != key
        }
        for (kind, key), record in old.items():
            write_json(self.files.of(".superseded") / f"{kind}-{key}.json", record)
            del self._found[kind, key]
        if old:
            self.merge(without=old)

    def merge(self, *, without: Mapping[Identity, Any] | None = None) -> None:
        """Move the records of ended runs of all processes into the tables, `without` some."""
        files = self.files
        if not files.parts.exists() and not without:
            return
        with files.lock():
            parts = files.read_parts()
            if not parts and not without:
                return
            found = dict(_identified(files.read_locked()))
            files.replace([found[name] for name in found if name not in (without or {})])
            for path, _ in parts:
                path.unlink()


def _identified(records: Sequence[dict[str, Any]]) -> Iterator[tuple[Identity, dict[str, Any]]]:
    """Yield records with the current keys of their configurations.

    Settings added since a record was written count as defaults.
    """
    for record in records:
        yield (record["kind"], key_of(record["config"], record.get("exam"))), record


def _place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("model", "task", "method", "budget", "seed"))


def open_records(study: Study) -> Records:
    """Read the records of a study, if there are any.

    Raises:
        RunFileError: If a file is damaged or not a record.
    """
    if study.results.exists() and not study.results.is_dir():
        raise RunFileError(
            f"`results` of {study.file} must be a folder, but got {study.results}, a file. "
            "Name another."
        )
    records = Records(study)
    records._found.update(_identified(records.files.read()))
    return records


def as_record(study: Study, run: Run, outcome: Outcome) -> dict[str, Any]:
    """Return the record of a run."""
    return {
        "study": study.name,
        "description": study.description,
        "kind": run.kind,
        "key": run.key,
        **asdict(run.combination),
        "seed": run.seed,
        "trial": run.trial,
        "status": outcome.status,
        "error": None if outcome.error is None else shorten(outcome.error, LONGEST_ERROR),
        "diverged": outcome.diverged,
        "notes": list(outcome.notes),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "tuned": None if run.tuned is None else asdict(run.tuned),
        "exam": None if run.exam is None else asdict(run.exam),
        "config": plain(run.config),
        **EMPTY,
        **(outcome.values or {}),
    }
