"""Read a job's splits from files, folders or the hub, as one table of raw columns per split.

Values keep the file's types, so that errors can show bad labels exactly as written.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dynlora.errors import DataError
from dynlora.files.tables import TABLES, Reader, column_names, read_table
from dynlora.train.config import DataConfig
from dynlora.train.data.image_files import class_names, read_class_folders

LAYOUTS: Sequence[tuple[frozenset[str], Mapping[str, Any]]] = (
    (frozenset({"messages"}), {"messages": "messages"}),
    (frozenset({"conversations"}), {"messages": "conversations"}),  # ShareGPT
    (
        frozenset({"instruction", "input", "output"}),  # Alpaca
        {"prompt": ("instruction", "input"), "completion": "output"},
    ),
    (frozenset({"instruction", "output"}), {"prompt": "instruction", "completion": "output"}),
    (frozenset({"prompt", "completion"}), {"prompt": "prompt", "completion": "completion"}),
)
"""Usual columns of data for language models, and the keys of section `data` for them."""
HOLD_OUT_SEED = 0
"""Seed for held-out and sampled rows, which must not depend on the training seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSplit:
    """One split before validation."""

    name: str
    """`training`, `validation`, `given` for a single file, or the split's own name."""
    source: str
    """File, hub name or description, for messages."""
    table: pa.Table
    rows: Sequence[int]
    """Index of each row in the source, counted from 0."""
    folder: Path = Path()
    """Base folder of relative paths in the table."""
    class_names: Sequence[str] | None = None

    def take(self, rows: Sequence[int], name: str | None = None) -> "RawSplit":
        """Return a subset of the rows, in ascending order."""
        chosen = sorted(rows)
        rows = [self.rows[row] for row in chosen]
        places = pa.array(chosen, pa.int64())  # an empty array needs an explicit type
        return replace(self, name=name or self.name, table=self.table.take(places), rows=rows)


def find_columns(config: DataConfig) -> DataConfig:
    """Return the configuration with the keys of one of `LAYOUTS`, if it names no column.

    A column named `text` counts first. Unreadable data are refused where the rows are read.
    """
    if config.text != "text" or config.prompt is not None or config.messages is not None:
        return config
    names: list[str] = []
    with suppress(DataError, OSError):
        names = train_columns(config)
    found = (keys for columns, keys in LAYOUTS if columns <= {*names} and "text" not in names)
    return replace(config, **next(found, {}))


def train_columns(config: DataConfig) -> list[str]:
    """Return the columns of the training split, empty for a folder of images."""
    if config.path is None:
        names: list[str] = _read_hub("training", config.train_split, config).table.column_names
        return names
    path = Path(config.path)
    place = _locate(path, "training", config.train_split) if path.is_dir() else path
    return column_names(place) if place.is_file() and place.suffix in TABLES else []


def load_splits(config: DataConfig) -> tuple[RawSplit, RawSplit]:
    """Return the training and the validation split, sampled down to the row limits."""
    path = None if config.path is None else Path(config.path)
    count = config.validation_rows_from_train
    if path is not None and path.is_file():
        found = [read_file("training", path, config)]
        if count is None:  # at least one row is held out, and at least one remains
            rows = found[0].table.num_rows
            count = min(max(1, round(rows * config.validation_fraction)), rows - 1)
    else:
        if path is not None and not path.exists():
            raise DataError(f"`data.path` must name a folder or a file, got {path}: no such path.")
        wanted = {"training": config.train_split}
        if count is None:
            wanted["validation"] = config.validation_split
        if path is None:
            found = [_read_hub(name, split, config) for name, split in wanted.items()]
        else:  # locate both before any is read
            places = {name: _locate(path, name, split) for name, split in wanted.items()}
            first = places["training"]
            classes = class_names(first) if first.is_dir() else None
            found = [_read_place(*place, config, classes) for place in places.items()]
    train, validation = found if count is None else _hold_out(found[0], count)
    return sample(train, config.max_train_rows), sample(validation, config.max_validation_rows)


def load_split(
    name: str, split: str, config: DataConfig, classes: Sequence[str] | None, limit: int | None
) -> RawSplit:
    """Return at most `limit` rows of a split of a folder or hub data set, with another `name`."""
    if config.path is None:
        return sample(_read_hub(name, split, config), limit)
    place = _locate(Path(config.path), name, split)
    return sample(_read_place(name, place, config, classes), limit)


def read_file(
    name: str, path: Path, config: DataConfig, readers: Mapping[str, Reader] = TABLES
) -> RawSplit:
    """Return all rows of a file, unchecked."""
    if path.suffix not in readers:
        raise DataError(
            f"a data file must end in {', '.join(readers)}, got {path.name!r} in {path.parent}: "
            "convert it to one of these."
        )
    named = (config.text, config.text_pair, config.completion, config.image)
    asked = (config.prompt,) if isinstance(config.prompt, str) else config.prompt or ()
    texts = [column for column in (*named, *asked) if column is not None]
    return whole_split(name, str(path), read_table(path, texts, readers), path.parent)


def whole_split(name: str, source: str, table: pa.Table, folder: Path = Path()) -> RawSplit:
    """Return all rows of a table."""
    rows = range(table.num_rows)
    return RawSplit(name=name, source=source, table=table, rows=rows, folder=folder)


def _hold_out(train: RawSplit, count: int) -> list[RawSplit]:
    """Split off `count` random rows as the validation split."""
    rows = train.table.num_rows
    if count >= rows:
        raise DataError(
            f"`data.validation_rows_from_train` must leave rows to train on, got {count} of the "
            f"{rows} rows in {train.source}: lower it, or leave it out and evaluate on "
            "`data.validation_split`."
        )
    order = _random_order(train)
    return [train.take(order[count:]), train.take(order[:count], "validation")]


def sample(split: RawSplit, limit: int | None) -> RawSplit:
    """Return at most `limit` rows of a split, sampled with a fixed seed; None keeps all."""
    if limit is None or split.table.num_rows <= limit:
        return split
    return split.take(_random_order(split)[:limit])


def _random_order(split: RawSplit) -> list[int]:
    generator = np.random.default_rng(HOLD_OUT_SEED)
    rows: list[int] = generator.permutation(split.table.num_rows).tolist()
    return rows


def _read_place(
    name: str, place: Path, config: DataConfig, classes: Sequence[str] | None
) -> RawSplit:
    """Return the rows of a split's file, or of its folder of images."""
    if place.is_file():
        return read_file(name, place, config)
    if classes is None:
        raise DataError(
            f"one folder a class can be read only where the names of the classes are known from "
            f"training, got {place} for a model whose training data has numbers alone: give a "
            "file with the classes' numbers, or train on folders."
        )
    table = read_class_folders(place, classes, config)
    return replace(whole_split(name, str(place), table, place), class_names=list(classes))


def _locate(folder: Path, name: str, split: str) -> Path:
    """Return a split's file, or its folder of images."""
    places = [path for ext in TABLES if (path := folder / f"{split}{ext}").is_file()]
    if (folder / split).is_dir():
        places.append(folder / split)
    if len(places) != 1:
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file())) or "none"
        raise DataError(
            f"the data must hold one file named {split} with the ending {', '.join(TABLES)} for "
            f"the {name} split, or for images a folder {split} with one folder a class, got "
            f"{len(places)} in {folder}, whose files are: {found}. Name a split that is there, "
            "without its ending."
        )
    return places[0]


def _read_hub(name: str, split: str, config: DataConfig) -> RawSplit:
    import datasets

    where = "/".join(part for part in (config.name, config.subset) if part)
    try:
        loaded = datasets.load_dataset(config.name, config.subset, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the {name} split {split!r} of {where} could not be loaded from the hub: {reason} "
            "Check `data.name`, `data.subset` and the split, or give local files with `data.path`."
        ) from error
    return whole_split(name, where, loaded.with_format("arrow")[:])
