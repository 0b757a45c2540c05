"""Rows that a finished run is asked about: any split of its data, another folder, or one file."""

from dataclasses import replace
from pathlib import Path

from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.sources import RawSplit, load_file, load_splits


def find_rows(config: DataConfig, split: str | None, place: Path | None) -> RawSplit:
    """Return the rows that are meant.

    Args:
        config: The run's own data.
        split: Name of a split; None takes the validation split.
        place: A file, all of whose rows are meant, or a folder to look for the split in; None
            stays with the run's own data.

    Raises:
        DataError: If there is no such split or file, it cannot be read, or a file is given with a
            split.
    """
    if place is None:
        return find_split(config, split or config.validation_split)
    if place.is_dir():
        other = replace(config, path=str(place), max_train_rows=None, max_validation_rows=None)
        return find_split(other, split or config.validation_split)
    if split is not None:
        raise DataError(
            f"`--split` must be left out where `--data` is a file, whose rows are all taken, got "
            f"--split {split} and {place}: give one of the two."
        )
    return find_file(config, place, "`--data` must be a file or folder")


def find_file(config: DataConfig, path: Path, required: str) -> RawSplit:
    """Return all rows of a file.

    Args:
        config: Says which columns hold texts.
        path: The file.
        required: Begins the message where there is no such file.

    Raises:
        DataError: If it is missing or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{required} that exists, got {path}: check the path.")
    return load_file(path, config)


def find_split(config: DataConfig, name: str) -> RawSplit:
    """Return one split of a run's data by its name.

    The run's own two are sampled as it sampled them; others are taken whole.

    Raises:
        DataError: If there is no such split, or it cannot be read.
    """
    if name == config.validation_split:
        return load_splits(config)[1]
    if name == config.train_split:
        return load_splits(config)[0]
    file = config.path is not None and Path(config.path).is_file()
    if file or (config.path is None and config.embedded is not None):
        raise DataError(
            f"`--split` must be {config.train_split} or {config.validation_split}, got {name}: "
            f"{config.path or config.embedded} has no other; give a file with `--data`."
        )
    other = replace(
        config,
        train_split=name,
        validation_split=name,
        max_train_rows=None,
        max_validation_rows=None,
    )
    return replace(load_splits(other)[1], name=name)
