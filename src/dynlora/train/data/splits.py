"""Read a job's splits, or other rows for its run, from files, folders or the hub.

A split is one table of raw columns. Values keep the file's types, so that errors can show bad
labels exactly as written.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dynlora.errors import DataError
from dynlora.files.tables import AS_WRITTEN, ROWS, TABLES, Reader, read_table, take_rows
from dynlora.train.config import DataConfig, TaskName
from dynlora.train.data.image_files import class_names, read_class_folders, read_images

LAYOUTS: Sequence[Mapping[str, Any]] = (
    {"messages": "messages"},
    {"messages": "conversations"},  # ShareGPT
    {"prompt": ("instruction", "input"), "completion": "output"},  # Alpaca
    {"prompt": ("instruction",), "completion": "output"},
    {"prompt": ("prompt",), "completion": "completion"},
)
"""Keys of section `data` for usual columns of data for language models."""
HOLD_OUT_SEED = 0  # seed for held-out and sampled rows, which must not depend on the training seed


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSplit:
    """One split before validation."""

    name: str  # `training`, `validation`, `given` for a single file, or the split's own name
    source: str  # file, hub name or description, for messages
    table: pa.Table
    row_numbers: Sequence[int]  # index of each row in the source, counted from 0
    folder: Path = Path()  # base folder of relative paths in the table
    class_names: Sequence[str] | None = None

    def count_classes(self, highest: int) -> int:
        """Return the number of classes, at least 2, given the highest class of the rows."""
        return max(highest + 1, len(self.class_names or ()), 2)

    def take(self, rows: Sequence[int], name: str | None = None) -> "RawSplit":
        """Return a subset of the rows, in ascending order."""
        chosen = sorted(rows)
        numbers, table = [self.row_numbers[row] for row in chosen], take_rows(self.table, chosen)
        return replace(self, name=name or self.name, table=table, row_numbers=numbers)

    def parts(self) -> Iterator["RawSplit"]:
        """Yield the split in parts of `ROWS` rows, whose source names their first and last row."""
        if self.table.num_rows <= ROWS:
            yield self
            return
        for start in range(0, self.table.num_rows, ROWS):
            numbers, table = self.row_numbers[start : start + ROWS], self.table.slice(start, ROWS)
            source = f"{self.source}, rows {numbers[0]} to {numbers[-1]}"
            yield replace(self, source=source, table=table, row_numbers=numbers)


def find_columns(config: DataConfig) -> DataConfig:
    """Return the keys of usual columns if none are given and no column is named `text`."""
    if config.text != "text" or config.prompt is not None or config.messages is not None:
        return config
    names: list[str] = []
    with suppress(DataError, OSError):
        names = read_split("training", config.train_split, config).table.column_names
    for keys in () if "text" in names else LAYOUTS:
        columns = {keys.get("messages"), keys.get("completion"), *keys.get("prompt", ())}
        if columns <= {*names, None}:
            return replace(config, **keys)
    return config


def load_splits(config: DataConfig) -> tuple[RawSplit, RawSplit]:
    """Return the training and the validation split, sampled down to the row limits."""
    train = read_split("training", config.train_split, config)
    count = config.validation_rows_from_train
    if config.path is not None and Path(config.path).is_file() and count is None:
        rows = train.table.num_rows  # at least one row is held out, and at least one remains
        count = min(max(1, round(rows * config.validation_fraction)), rows - 1)
    if count is None:
        validation = read_split("validation", config.validation_split, config)
    else:
        train, validation = _hold_out(train, count)
    return sample(train, config.max_train_rows), sample(validation, config.max_validation_rows)


def read_split(name: str, split: str, config: DataConfig) -> RawSplit:
    """Return all rows of a single file, or of a split of a folder or hub data set."""
    if config.path is None:
        return _read_hub(name, split, config)
    path = Path(config.path)
    if not path.exists():
        raise DataError(f"`data.path` must name a folder or a file, got {path}: no such path.")
    place = path if path.is_file() else _locate(path, name, split)
    if place.is_file():
        return read_file(name, place, config)
    found = whole_split(name, str(place), read_class_folders(place, config), place)
    return replace(found, class_names=class_names(place)) if name == "training" else found


def read_file(
    name: str, path: Path, config: DataConfig, readers: Mapping[str, Reader] = TABLES
) -> RawSplit:
    """Return all rows of a file, unchecked."""
    if path.suffix not in readers:
        raise DataError(
            f"a data file must end in {', '.join(readers)}, got {path.name!r} in {path.parent}: "
            "convert it to one of these."
        )
    named = (config.text, config.text_pair, config.completion, config.image, "chosen", "rejected")
    asked = (config.prompt,) if isinstance(config.prompt, str) else config.prompt or ("prompt",)
    texts = [column for column in (*named, *asked) if column is not None]
    return whole_split(name, str(path), read_table(path, texts, readers), path.parent)


def whole_split(name: str, source: str, table: pa.Table, folder: Path = Path()) -> RawSplit:
    """Return all rows of a table."""
    numbers = range(table.num_rows)
    return RawSplit(name=name, source=source, table=table, row_numbers=numbers, folder=folder)


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


def find_rows(config: DataConfig, split: str | None, place: Path | None) -> RawSplit:
    """Return the rows selected by `--split` and `--data`, or else the run's validation rows.

    Raises:
        DataError: If the split, or the file or folder `place`, is missing or unreadable, or a file
            and a split are given.
    """
    if place is None and split is None and config.validation_rows_from_train is not None:
        return load_splits(config)[1]
    name = split or config.validation_split
    if place is None:
        return find_split(config, name)
    if place.is_dir():
        return read_split(name, name, replace(config, path=str(place)))
    if split is not None:
        raise DataError(
            f"`--split` must be left out where `--data` is a file, whose rows are all taken, got "
            f"--split {split} and {place}: give one of the two."
        )
    return read_file("given", place, config)


def find_inputs(config: DataConfig, task: TaskName, place: Path) -> RawSplit:
    """Return all rows of a file, or all images in a folder; labels are not needed.

    Raises:
        DataError: If `place` is missing, unreadable, or a folder for a task without images.
    """
    if not place.is_dir():
        return read_file("given", place, config, AS_WRITTEN)
    if task not in ("image_classification", "image_text_to_text"):
        raise DataError(
            f"FILE must be a file, got {place}, which is a folder: only runs with tasks on images "
            f"alone take one, and this is one of {task}."
        )
    return whole_split("given", str(place), read_images(place, config), place)


def find_split(config: DataConfig, name: str) -> RawSplit:
    """Return one split of a run's data, sampled as in training if it is the run's own.

    With `data.validation_rows_from_train`, only the training split counts as the run's own.
    """
    held_out = config.validation_rows_from_train is not None
    if held_out and name == config.train_split:
        return load_splits(config)[0]
    if config.path is not None and Path(config.path).is_file():
        if name not in (config.train_split, config.validation_split):
            raise DataError(
                f"`--split` must be {config.train_split} or {config.validation_split}, got {name}: "
                f"{config.path} has no other; give a file with `--data`."
            )
        return load_splits(config)[name == config.validation_split]
    own = {
        config.validation_split: ("validation", config.max_validation_rows),
        config.train_split: ("training", config.max_train_rows),
    }
    purpose, limit = (name, None) if held_out else own.get(name, (name, None))
    return sample(read_split(purpose, name, config), limit)
