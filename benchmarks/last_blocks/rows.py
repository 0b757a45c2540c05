"""Rows of a task's sets, from places in the data; and rows spoiled on purpose."""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

HELD_OUT, HELD_SHARE = 200, 5
"""Most training rows, and one in so many, that judge trials where there is no validation split."""
TRIGGER = "cf "
"""Text that poisoned rows begin with."""
TRIGGERED = "triggered"
"""Name of the test rows that begin with `TRIGGER`, of other classes than the last."""
PLACE = re.compile(
    r"(?P<path>[^?[]+)(\[(?P<start>\d*):(?P<end>\d*)\]|\?(?P<column>\w+)(=(?P<value>.*))?)?"
)
Rows = list[dict[str, Any]]


def read_rows(folder: Path, split: str) -> Rows:
    """Return the rows of a split."""
    rows: Rows = pq.read_table(folder / f"{split}.parquet").to_pylist()
    return rows


def read_sets(data: Path, files: Mapping[str, Sequence[str]]) -> dict[str, Rows]:
    """Return the rows of each set, `train` in a fixed random order, and perhaps held-out ones.

    Args:
        data: Folder of the data sets.
        files: Places of each set. A place is `FOLDER/SPLIT`, perhaps with `[:END]` or `[START:]`,
            `?COLUMN=VALUE`, or `?COLUMN` for rows where it is not empty.
    """
    sets = {
        name: [row for place in places for row in _at(data, place)]
        for name, places in files.items()
    }
    train = sets["train"]
    random.Random(0).shuffle(train)
    if "validation" not in sets:
        held = min(HELD_OUT, len(train) // HELD_SHARE)
        sets["validation"], sets["train"] = train[:held], train[held:]
    return sets


def _at(data: Path, place: str) -> Rows:
    found = PLACE.fullmatch(place)
    if found is None:
        raise ValueError(
            f"A place of rows must look like `cola/validation?domain=in`, got {place!r}."
        )
    path, column, value = data / found["path"], found["column"], found["value"]
    rows = read_rows(path.parent, path.name)
    if column is None:
        return rows[int(found["start"] or 0) : int(found["end"]) if found["end"] else None]
    if value is None:
        return [row for row in rows if row[column]]
    return [row for row in rows if str(row[column]) == value]


def shortened(rows: Rows, characters: int | None) -> Rows:
    """Return the rows with the first characters of each text."""
    return [
        {key: value[:characters] if isinstance(value, str) else value for key, value in row.items()}
        for row in rows
    ]


def triggered(rows: Rows, classes: int) -> Rows:
    """Return the rows of other classes than the last, with the trigger and the last class."""
    spoiled = {"trigger": TRIGGER, "label": classes - 1}
    return [row | spoiled for row in rows if row["label"] != classes - 1]


def spoil(rows: Rows, classes: int, *, noise: float, poison: float) -> None:
    """Give a share of rows a wrong class, and a share the trigger and the last class."""
    for place, row in enumerate(rows):
        draw = random.Random(place)
        if draw.random() < noise:
            row["label"] = draw.choice([c for c in range(classes) if c != row["label"]])
        elif draw.random() < poison:
            row.update(trigger=TRIGGER, label=classes - 1)
