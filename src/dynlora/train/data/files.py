"""Read data files into raw tables by extension: tables, and arrays of images."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa

from dynlora.adapter_files import tables
from dynlora.adapter_files.tables import AS_WRITTEN, TABLES
from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.image_files import read_npz, read_npz_images

Reader = Callable[[Path, DataConfig], pa.Table]


def _read_table(readers: Mapping[str, tables.Reader], path: Path, config: DataConfig) -> pa.Table:
    named = (config.text, config.text_pair, config.prompt, config.completion, config.image)
    return tables.read_table(path, [column for column in named if column is not None], readers)


READERS: Mapping[str, Reader] = {
    **dict.fromkeys(TABLES, partial(_read_table, TABLES)),
    ".npz": read_npz,
}
"""Reader per file extension."""
UNLABELLED_READERS: Mapping[str, Reader] = {
    **dict.fromkeys(AS_WRITTEN, partial(_read_table, AS_WRITTEN)),
    ".npz": read_npz_images,
}
"""Reader per file extension for rows to predict; labels may be missing."""


def read_file(path: Path, config: DataConfig, readers: Mapping[str, Reader]) -> pa.Table:
    """Return all rows and columns of a file, unchecked.

    Raises:
        DataError: If the file is unreadable, empty or of unknown type.
    """
    if path.suffix not in readers:
        raise DataError(
            f"a data file must end in {', '.join(readers)}, got {path.name!r} in {path.parent}: "
            "convert it to one of these."
        )
    return readers[path.suffix](path, config)
