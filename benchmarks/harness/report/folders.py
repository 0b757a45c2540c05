"""Step 0. Read records from folders of results."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.records import Files
from benchmarks.harness.report.record import Record, as_record
from benchmarks.harness.tables import RUNS, SHARED
from dynlora.errors import RunFileError


def read_records(places: Sequence[Path]) -> list[Record]:
    """Return the records of single studies or of all studies in folders, each study once.

    Args:
        places: Folders of results, or tables of runs.

    Raises:
        RunFileError: If a place contains no records, or a file is damaged.
    """
    found: dict[Path, Files] = {}
    for place in places:
        for study in _studies(place):
            files = Files(place if place.is_dir() else place.parent, study)
            found.setdefault(files.of(RUNS).resolve(), files)
    return [
        as_record(files.of(RUNS) / f"{record['kind']}-{record['key']}", record)
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
            f"results must be a folder, or the {RUNS} file of a study, got {place}, which is "
            f"{'neither' if place.exists() else 'not there'}: run a study first."
        )
    names = {
        path.name.removesuffix(ending)
        for ending in (SHARED, ".parts", ".pending")
        for path in folder.glob(f"{pattern}{ending}")
    }
    if not names:
        raise RunFileError(
            f"results must contain the tables of a study, got {place}, where there are none: run "
            "a study first."
        )
    return sorted(names)
