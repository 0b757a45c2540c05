"""Data files to raw tables, by their endings: tables of any kind, and arrays of images."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa

from dynlora.errors import DataError
from dynlora.saved.tables import TABLES
from dynlora.train.config import DataConfig
from dynlora.train.image_sources import read_npz, read_npz_images

Reader = Callable[[Path, DataConfig], pa.Table]


def _table_reader(ending: str) -> Reader:
    def read(path: Path, config: DataConfig) -> pa.Table:
        named = (config.text, config.text_pair, config.prompt, config.completion, config.image)
        return TABLES[ending](path, [column for column in named if column is not None])

    return read


READERS: Mapping[str, Reader] = {
    **{ending: _table_reader(ending) for ending in TABLES},
    ".npz": read_npz,
}
"""By a file's ending, what reads its rows."""
UNLABELLED_READERS: Mapping[str, Reader] = {**READERS, ".npz": read_npz_images}
"""By a file's ending, what reads its rows, whose labels may be missing."""


def read_file(path: Path, config: DataConfig, readers: Mapping[str, Reader]) -> pa.Table:
    """Return all rows and columns of a file, unchecked.

    Raises:
        DataError: If it is unreadable, empty, or of unknown type.
    """
    if path.suffix not in readers:
        raise DataError(
            f"a data file must end in {', '.join(readers)}, got {path.name!r} in {path.parent}: "
            "convert it to one of these."
        )
    try:
        return readers[path.suffix](path, config)
    except (pa.ArrowInvalid, OSError) as error:
        if path.stat().st_size == 0:
            raise DataError(f"a split must hold at least 1 row, got 0 in {path}.") from error
        reason = " ".join(str(error).split())
        raise DataError(f"{path} must be a readable {path.suffix} file: {reason}") from error
