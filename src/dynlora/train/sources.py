"""Where a job's rows come from: configuration in, one table of raw columns a split out.

Local files are read with pyarrow into memory: nothing is cached on disk, and a row keeps the type
that its file gave it, so that a bad label can be named as it stands there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.embedded import stdlib_pairs
from dynlora.train.image_sources import class_names, read_class_folders, read_npz


def _read_csv(path: Path, config: DataConfig) -> pa.Table:
    """Read a CSV file whose empty cells are missing and whose texts may look like numbers."""
    named = (config.text, config.text_pair, config.prompt, config.completion, config.image)
    texts = [column for column in named if column is not None]
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(texts, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


READERS: Mapping[str, Callable[[Path, DataConfig], pa.Table]] = {
    ".parquet": lambda path, _: pyarrow.parquet.read_table(path),
    ".csv": _read_csv,
    ".jsonl": lambda path, _: pyarrow.json.read_json(path),
    ".npz": read_npz,
}
"""By a file's ending, what reads it."""
HOLD_OUT_SEED = 0
"""Which rows are held out or sampled must not change with the training seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSplit:
    """One split as it was found."""

    name: str
    """What the split is for: `training` or `validation`."""
    source: str
    """File, hub name or description, for messages."""
    table: pa.Table
    """All columns, unchecked."""
    rows: Sequence[int]
    """Where each row stands in the source, counted from 0."""
    folder: Path = Path()
    """Where paths in the table begin."""

    def take(self, rows: Sequence[int], name: str | None = None) -> "RawSplit":
        """Return some of the rows, in ascending order."""
        chosen = sorted(rows)
        rows = [self.rows[row] for row in chosen]
        return replace(self, name=name or self.name, table=self.table.take(chosen), rows=rows)


def load_splits(config: DataConfig) -> tuple[RawSplit, RawSplit]:
    """Return the training and the validation split, sampled down to the row limits.

    Raises:
        DataError: If a file, split or data set is missing, unreadable or of unknown type.
    """
    train, validation = _find_splits(config)
    return _sample(train, config.max_train_rows), _sample(validation, config.max_validation_rows)


def load_file(path: Path, config: DataConfig) -> RawSplit:
    """Return all rows of a file, unchecked.

    Raises:
        DataError: If it is unreadable or of unknown type.
    """
    return _from_file("given", path, config)


def _find_splits(config: DataConfig) -> tuple[RawSplit, RawSplit]:
    if config.path is not None:
        path = Path(config.path)
        if not path.exists():
            raise DataError(f"`data.path` must name a folder or a file, got {path}: no such path.")
        return _split_file(path, config) if path.is_file() else _read_folder(path, config)
    if config.embedded is not None:
        train, validation = stdlib_pairs()
        return (
            _whole("training", "embedded", pa.Table.from_pylist(train)),
            _whole("validation", "embedded", pa.Table.from_pylist(validation)),
        )
    return _read_hub(config, "training"), _read_hub(config, "validation")


def _whole(name: str, source: str, table: pa.Table, folder: Path = Path()) -> RawSplit:
    rows = range(table.num_rows)
    return RawSplit(name=name, source=source, table=table, rows=rows, folder=folder)


def _read_folder(folder: Path, config: DataConfig) -> tuple[RawSplit, RawSplit]:
    train = _locate(folder, "training", "train_split", config.train_split)
    validation = _locate(folder, "validation", "validation_split", config.validation_split)
    classes = class_names(train) if train.is_dir() else []

    def read(name: str, place: Path) -> RawSplit:
        if place.is_file():
            return _from_file(name, place, config)
        table = read_class_folders(place, classes or class_names(place), config)
        return _whole(name, str(place), table, place)

    return read("training", train), read("validation", validation)


def _locate(folder: Path, name: str, key: str, split: str) -> Path:
    """Return a split's file, or its folder of images."""
    places = [path for ext in READERS if (path := folder / f"{split}{ext}").is_file()]
    if (folder / split).is_dir():
        places.append(folder / split)
    if len(places) != 1:
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file())) or "none"
        raise DataError(
            f"`data.path` must hold one file named {split} with the ending "
            f"{', '.join(READERS)} for the {name} split, or for images a folder {split} with one "
            f"folder a class, got {len(places)} in {folder}, whose files are: {found}. Set "
            f"`data.{key}` to the one to use, without its ending."
        )
    return places[0]


def _from_file(name: str, path: Path, config: DataConfig) -> RawSplit:
    return _whole(name, str(path), _read_file(path, config), path.parent)


def _split_file(path: Path, config: DataConfig) -> tuple[RawSplit, RawSplit]:
    both = _from_file("training", path, config)
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(both.table.num_rows).tolist()
    held_out = round(len(order) * config.validation_fraction)
    return both.take(order[held_out:]), both.take(order[:held_out], "validation")


def _read_file(path: Path, config: DataConfig) -> pa.Table:
    if path.suffix not in READERS:
        raise DataError(
            f"a data file must end in {', '.join(READERS)}, got {path.name!r} in {path.parent}: "
            "convert it to one of these."
        )
    try:
        return READERS[path.suffix](path, config)
    except (pa.ArrowInvalid, OSError) as error:
        if path.stat().st_size == 0:
            raise DataError(f"a split must hold at least 1 row, got 0 in {path}.") from error
        reason = " ".join(str(error).split())
        raise DataError(f"{path} must be a readable {path.suffix} file: {reason}") from error


def _read_hub(config: DataConfig, name: str) -> RawSplit:
    import datasets

    split = config.train_split if name == "training" else config.validation_split
    where = "/".join(part for part in (config.name, config.subset) if part)
    try:
        loaded = datasets.load_dataset(config.name, config.subset, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the {name} split {split!r} of {where} could not be loaded from the hub: {reason} "
            "Check `data.name`, `data.subset` and the split's name, or give local files with "
            "`data.path`."
        ) from error
    return _whole(name, where, loaded.with_format("arrow")[:])


def _sample(split: RawSplit, limit: int | None) -> RawSplit:
    if limit is None or split.table.num_rows <= limit:
        return split
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(split.table.num_rows)
    return split.take(order[:limit].tolist())
