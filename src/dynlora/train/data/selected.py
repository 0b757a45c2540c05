"""Find the rows to evaluate or predict with a finished run: a split, another folder, or a file."""

from dataclasses import replace
from pathlib import Path

from dynlora.errors import DataError
from dynlora.files.tables import AS_WRITTEN
from dynlora.train.config import DataConfig, TaskName
from dynlora.train.data import splits
from dynlora.train.data.image_files import read_images


def find_rows(config: DataConfig, split: str | None, place: Path | None) -> splits.RawSplit:
    """Return the rows selected by `--split` and `--data`, or else the run's validation rows.

    Raises:
        DataError: If the split, or the file or folder `place`, is missing or unreadable, or a file
            and a split are given.
    """
    if place is None and split is None and config.validation_rows_from_train is not None:
        return splits.load_splits(config)[1]
    name = split or config.validation_split
    if place is None:
        return find_split(config, name)
    if place.is_dir():
        return splits.read_split(name, name, replace(config, path=str(place)))
    if split is not None:
        raise DataError(
            f"`--split` must be left out where `--data` is a file, whose rows are all taken, got "
            f"--split {split} and {place}: give one of the two."
        )
    if not place.is_file():
        raise DataError(f"`--data` must be a file or folder that exists, got {place}.")
    return splits.read_file("given", place, config)


def find_inputs(config: DataConfig, task: TaskName, place: Path) -> splits.RawSplit:
    """Return all rows of a file, or all images in a folder; labels are not needed.

    Raises:
        DataError: If `place` is missing, unreadable, or a folder for a task without images.
    """
    if not place.exists():
        raise DataError(f"FILE must be a file that exists, got {place}: check the path.")
    if not place.is_dir():
        return splits.read_file("given", place, config, AS_WRITTEN)
    if task not in ("image_classification", "image_text_to_text"):
        raise DataError(
            f"FILE must be a file, got {place}, which is a folder: only runs with tasks on images "
            f"alone take one, and this is one of {task}."
        )
    return splits.whole_split("given", str(place), read_images(place, config), place)


def find_split(config: DataConfig, name: str) -> splits.RawSplit:
    """Return one split of a run's data, sampled as in training if it is the run's own.

    With `data.validation_rows_from_train`, only the training split counts as the run's own.
    """
    held_out = config.validation_rows_from_train is not None
    if held_out and name == config.train_split:
        return splits.load_splits(config)[0]
    if config.path is not None and Path(config.path).is_file():
        if name not in (config.train_split, config.validation_split):
            raise DataError(
                f"`--split` must be {config.train_split} or {config.validation_split}, got {name}: "
                f"{config.path} has no other; give a file with `--data`."
            )
        return splits.load_splits(config)[name == config.validation_split]
    own = {
        config.validation_split: ("validation", config.max_validation_rows),
        config.train_split: ("training", config.max_train_rows),
    }
    purpose, limit = (name, None) if held_out else own.get(name, (name, None))
    return splits.sample(splits.read_split(purpose, name, config), limit)
