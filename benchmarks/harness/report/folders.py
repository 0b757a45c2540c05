"""Step 0. Folders in, records out: one JSON file a run, in a folder of its own for each study."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.report.record import Record, as_record
from dynlora.errors import RunFileError
from dynlora.files.json_files import read_json


def read_records(folders: Sequence[Path]) -> list[Record]:
    """Return the records in folders of one study, or of one folder a study.

    A folder given twice is read once.

    Raises:
        RunFileError: If a folder is missing or holds no record, or a file is not a record.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        paths = _files(folder)
        if not paths:
            raise RunFileError(
                f"a folder of results must hold a folder a study with JSON files, or be one, got "
                f"{folder}, where there is none: run a study first."
            )
        found |= {path.resolve(): path for path in paths}
    return [as_record(path, read_json(path)) for path in found.values()]


def _files(folder: Path) -> list[Path]:
    """Return the records below a folder; beside folders of studies lie files of other kinds."""
    if not folder.is_dir():
        raise RunFileError(
            f"results must be a folder, got {folder}, which is "
            f"{'a file' if folder.exists() else 'not there'}: give a folder of records."
        )
    return sorted(folder.glob("*/*.json")) or sorted(folder.glob("*.json"))
