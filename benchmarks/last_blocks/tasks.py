"""The screen's file, and its tasks: public data sets to labelled positions, in four splits.

In all tasks some positions of an example have a label: the following token of a text, or the class
of an image at its class token. A classification of texts asks for one token behind the text.
"""

import random
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import derive
from benchmarks.last_blocks.frozen_trunk import IGNORED, IMAGE_POSITIONS, Examples
from benchmarks.last_blocks.questions import QUESTIONS, Marked, Tokenizer, marked, marker
from benchmarks.last_blocks.rows import TRIGGERED, read_rows, read_sets, shortened, spoil, triggered

BLOCK = 128
"""Most tokens per example of a text."""
SHORTEST = 8
"""Fewest tokens per example of a text."""
PARTS = ("trial_train", "trial_judge", "final_train", "final_judge")
"""Splits: what trials and final runs train on and are judged by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """A task in the study's file."""

    kind: str
    """`text`, `facts`, `answers`, `images`, or a classification in `QUESTIONS`."""
    folder: str = ""
    """Folder of the data; of `answers`, in the cache."""
    batch: int
    """Examples per batch."""
    epochs: int = 1
    tokens: int = 0
    """Least training tokens of a text."""
    judged_tokens: int = 0
    """Least tokens per split that judges a text."""
    rows: int = 0
    """Facts to learn, or most rows that judge a task with answers or classes."""
    files: Mapping[str, list[str]] = field(default_factory=dict)
    """Of a classification, in place of `folder`: places of rows for `train`, `test`, perhaps
    `validation`, and others that judge final runs. A place is `FOLDER/SPLIT`, perhaps with `[:END]`
    or `[START:]`, `?COLUMN=VALUE`, or `?COLUMN` for rows where it is not empty."""
    most: int = 0
    """Most training rows; 0 for all."""
    noise: float = 0.0
    """Share of training rows with a wrong class."""
    poison: float = 0.0
    """Share of training rows with `TRIGGER` before the text and the last class."""
    characters: int | None = None
    """Most characters of each text of a row."""
    late: int | None = None
    """Label without rows in the first half of training, as a position in the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """A screen; the fields are the keys of its file, which explains them."""

    r: int
    wide: int
    ceiling: int
    blocks: int
    scale: float
    learning_rates: list[float]
    allocation_rates: list[float]
    more_trials: int
    tuning_seed: int
    seeds: list[int]
    tasks: dict[str, TaskConfig]


def read_screen(path: Path) -> Screen:
    """Return the study of a file."""
    values = tomllib.loads(path.read_text())
    tasks = {name: TaskConfig(**given) for name, given in values.pop("tasks").items()}
    return Screen(**values, tasks=tasks)


@dataclass(frozen=True, slots=True)
class TaskExamples:
    """Examples by part; parts with equal examples share one object."""

    parts: Mapping[str, Examples]
    vocabulary: list[int]
    """Token ids or classes; positions in this list are the labels."""


def read_task(config: TaskConfig, data: Path, cache: Path, tokenize: Tokenizer) -> TaskExamples:
    """Return the examples of a task.

    Args:
        config: The task.
        data: Folder of the public data sets.
        cache: Folder for derived data sets.
        tokenize: Returns the token ids of a text, without special tokens.
    """
    folder = data / config.folder
    if config.files:
        return _judged_by_many(config, data, tokenize)
    match config.kind:
        case "text":
            return _text(config, folder, tokenize)
        case "facts":
            return _facts(config, folder, tokenize)
        case "answers":
            return _answers(config, data, cache, tokenize)
        case "images":
            return _images(config, folder)
        case _:
            return _classification(config, folder, tokenize)


def _text(config: TaskConfig, folder: Path, tokenize: Tokenizer) -> TaskExamples:
    train, validation, test = (
        _blocks(read_rows(folder, split), tokenize, tokens)
        for split, tokens in (
            ("train", config.tokens),
            ("validation", config.judged_tokens),
            ("test", config.judged_tokens),
        )
    )
    return _indexed(train, validation, train, test)


def _blocks(rows: list[dict[str, Any]], tokenize: Tokenizer, wanted: int) -> list[Marked]:
    """Return blocks of documents in a fixed random order, until there are enough tokens."""
    random.Random(0).shuffle(rows)
    found: list[Marked] = []
    total = 0
    for row in rows:
        ids = tokenize(row["text"])
        for start in range(0, len(ids), BLOCK):
            if len(block := ids[start : start + BLOCK]) >= SHORTEST and total < wanted:
                found.append((block, 1))
                total += len(block)
    return found


def _facts(config: TaskConfig, folder: Path, tokenize: Tokenizer) -> TaskExamples:
    """Return the first rows for final runs, and the next rows for trials.

    A run is judged by the facts that it trains on, because only memory can know them.
    """
    rows = read_rows(folder, "train")[: 2 * config.rows]
    facts = [marked(tokenize(row["prompt"]), tokenize(row["completion"])) for row in rows]
    final, trial = facts[: config.rows], facts[config.rows :]
    return _indexed(trial, trial, final, final)


def _answers(config: TaskConfig, data: Path, cache: Path, tokenize: Tokenizer) -> TaskExamples:
    """Return questions with answers, which are derived if the cache lacks them."""
    if not (cache / config.folder / "test.parquet").exists():
        derive.DATA_SETS[config.folder](data, cache)
    train, validation, test = (
        [marked(tokenize(row["prompt"]), tokenize(row["completion"])) for row in rows]
        for rows in _judging_rows(config, cache / config.folder)
    )
    return _indexed(train, validation, train, test)


def _images(config: TaskConfig, folder: Path) -> TaskExamples:
    """Return images in a fixed random order: judges of trials, judges of final runs, and others."""
    with np.load(folder / "t10k.npz") as arrays:
        images, classes = arrays["images"], arrays["labels"]
    order = np.random.default_rng(0).permutation(len(classes))
    validation, test, train = (
        Examples(
            images[rows], [[c] + [IGNORED] * (IMAGE_POSITIONS - 1) for c in classes[rows].tolist()]
        )
        for rows in np.split(order, [config.rows, 2 * config.rows])
    )
    parts = dict(zip(PARTS, (train, validation, train, test), strict=True))
    return TaskExamples(parts, sorted(set(classes.tolist())))


def _classification(config: TaskConfig, folder: Path, tokenize: Tokenizer) -> TaskExamples:
    mark = marker(config.kind, tokenize)
    train, validation, test = ([*map(mark, rows)] for rows in _judging_rows(config, folder))
    return _indexed(train, validation, train, test)


def _judged_by_many(config: TaskConfig, data: Path, tokenize: Tokenizer) -> TaskExamples:
    """Return the examples of a classification that several sets of rows judge."""
    classes = len(QUESTIONS[config.kind][1])
    sets = {
        name: shortened(rows, config.characters)
        for name, rows in read_sets(data, config.files).items()
    }
    if config.poison:
        sets[TRIGGERED] = triggered(sets["test"], classes)
    train = sets.pop("train")[: config.most or None]
    spoil(train, classes, noise=config.noise, poison=config.poison)
    mark = marker(config.kind, tokenize)
    found = {name: [*map(mark, rows[: config.rows or None])] for name, rows in sets.items()}
    learned, trial, test = [*map(mark, train)], found.pop("validation"), found.pop("test")
    return _indexed(learned, trial, learned, test, **found)


def _judging_rows(config: TaskConfig, folder: Path) -> list[list[dict[str, Any]]]:
    """Return rows for training, trials and final runs; a missing test split is half of another."""
    train, validation = read_rows(folder, "train"), read_rows(folder, "validation")
    random.Random(0).shuffle(validation)
    if (folder / "test.parquet").exists():
        test = read_rows(folder, "test")
    else:
        half = len(validation) // 2
        validation, test = validation[:half], validation[half:]
    return [train, validation[: config.rows], test[: config.rows]]


def _indexed(*parts: list[Marked], **others: list[Marked]) -> TaskExamples:
    """Return examples, with labels as positions in the vocabulary of all parts' labels.

    `others` are sets of examples that judge final runs too, by name.
    """
    named = dict(zip(PARTS, parts, strict=True)) | others
    labels = {token for part in named.values() for ids, start in part for token in ids[start:]}
    places = {token: place for place, token in enumerate(sorted(labels))}
    made: dict[int, Examples] = {}
    for part in named.values():
        if id(part) not in made:
            made[id(part)] = _examples(sorted(part, key=lambda marked: len(marked[0])), places)
    return TaskExamples({name: made[id(part)] for name, part in named.items()}, sorted(labels))


def _examples(part: Iterable[Marked], places: Mapping[int, int]) -> Examples:
    ids, labels = [], []
    for tokens, start in part:
        ids.append(tokens[:-1])
        labels.append([IGNORED] * (start - 1) + [places[token] for token in tokens[start:]])
    return Examples(ids, labels)
