"""Rows that a finished run is asked about: any split of its data, another folder, or one file.

Only what is asked for must be there. Folders of images are read with the names that the run's
classes have, so that a folder with other classes, or fewer, changes no class's number.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dynlora.errors import DataError
from dynlora.train.config import DataConfig, TaskName
from dynlora.train.sources import (
    RawSplit,
    Wanted,
    load_file,
    load_split,
    load_splits,
    load_unlabelled,
)

Names = Sequence[str] | None
"""What a run's classes are called; None where they have numbers alone."""


def find_rows(config: DataConfig, split: str | None, place: Path | None, names: Names) -> RawSplit:
    """Return the rows that are meant.

    Args:
        config: The run's own data.
        split: Name of a split; None takes the rows that the run was validated on.
        place: A file, all of whose rows are meant, or a folder to look for the split in; None
            stays with the run's own data.
        names: Of the run's classes.

    Raises:
        DataError: If there is no such split or file, it cannot be read, or a file is given with a
            split.
    """
    if place is None and split is None and config.validation_rows_from_train is not None:
        return load_splits(config)[1]
    if place is None:
        return find_split(config, split or config.validation_split, names)
    if place.is_dir():
        name = split or config.validation_split
        wanted = Wanted(
            name=name,
            split=name,
            place="`--data`",
            advice="Name one that is there with `--split`, without its ending, or give a file.",
        )
        return load_split(replace(config, path=str(place)), wanted, names, None)
    if split is not None:
        raise DataError(
            f"`--split` must be left out where `--data` is a file, whose rows are all taken, got "
            f"--split {split} and {place}: give one of the two."
        )
    if not place.is_file():
        raise DataError(f"`--data` must be a file or folder that exists, got {place}.")
    return load_file(place, config)


def find_inputs(config: DataConfig, task: TaskName, place: Path) -> RawSplit:
    """Return all rows of a file, or all images in a folder; labels are not needed.

    Args:
        config: Says which columns hold what.
        task: Whether there may be a folder.
        place: The file or folder.

    Raises:
        DataError: If it is missing or cannot be read.
    """
    if not place.exists():
        raise DataError(f"FILE must be a file that exists, got {place}: check the path.")
    if place.is_dir() and task != "image_classification":
        raise DataError(
            f"FILE must be a file, got {place}, which is a folder: only runs with `task: "
            f"image_classification` take one, of images, and this is one of {task}."
        )
    return load_unlabelled(place, config)


def find_split(config: DataConfig, name: str, names: Names) -> RawSplit:
    """Return one split of a run's data by its name.

    The run's own two are sampled as it sampled them; others are taken whole. A run that held rows
    of its training split out has no other validation split of its own.

    Raises:
        DataError: If there is no such split, or it cannot be read.
    """
    held_out = config.validation_rows_from_train is not None
    if held_out and name == config.train_split:
        return load_splits(config)[0]
    own = {
        config.validation_split: ("validation", config.max_validation_rows),
        config.train_split: ("training", config.max_train_rows),
    }
    if held_out:
        own = {}
    file = config.path is not None and Path(config.path).is_file()
    if file or (config.path is None and config.embedded is not None):
        if name in (config.train_split, config.validation_split):
            if held_out and not file:
                config = replace(config, validation_rows_from_train=None, max_validation_rows=None)
            return load_splits(config)[name == config.validation_split]
        raise DataError(
            f"`--split` must be {config.train_split} or {config.validation_split}, got {name}: "
            f"{config.path or config.embedded} has no other; give a file with `--data`."
        )
    if config.path is not None and not Path(config.path).exists():
        raise DataError(
            f"the run's data must be where it was, {config.path}, where nothing is now: give "
            "another place with `--data`."
        )
    purpose, limit = own.get(name, (name, None))
    wanted = Wanted(
        name=purpose,
        split=name,
        place="the run's data" if config.path is not None else "`data.name`",
        advice="Name one that is there with `--split`, or give other data with `--data`.",
    )
    return load_split(config, wanted, names, limit)
