"""The screen's file, and its tasks: public data sets to labelled positions, in four splits.

In all tasks some positions of an example have a label: the following token of a text, or the class
of an image at its class token. A classification of texts asks for one token behind the text.
"""

import random
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks import derive
from benchmarks.frozen_trunk import IGNORED, IMAGE_POSITIONS, Examples

BLOCK = 128
"""Most tokens per example of a text."""
SHORTEST = 8
"""Fewest tokens per example of a text."""
PARTS = ("trial_train", "trial_judge", "final_train", "final_judge")
"""Splits: what trials and final runs train on and are judged by."""

Marked = tuple[list[int], int]
"""Token ids, and the number of leading ones without a label."""
Tokenizer = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """A task in the study's file."""

    kind: str
    """`text`, `facts`, `answers`, `images`, or a classification in `QUESTIONS`."""
    folder: str
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


LETTERS = tuple(f" {letter}" for letter in "ABCDEFGHIJKLM")
QUESTIONS: Mapping[str, tuple[Callable[[Mapping[str, Any]], str], tuple[str, ...]]] = {
    "qnli": (
        lambda row: f"Question: {row['question']}\nText: {row['sentence']}\nAnswered:",
        (" yes", " no"),
    ),
    "sst2": (lambda row: f"Review: {row['sentence']}\nOpinion:", (" negative", " positive")),
    "stsb": (
        lambda row: f"One: {row['sentence1']}\nTwo: {row['sentence2']}\nSimilarity:",
        (" zero", " one", " two", " three", " four", " five"),
    ),
    "mrpc": (
        lambda row: f"One: {row['sentence1']}\nTwo: {row['sentence2']}\nSame meaning:",
        (" no", " yes"),
    ),
    "cola": (lambda row: f"Sentence: {row['sentence']}\nGrammar:", (" wrong", " right")),
    "chemprot": (lambda row: f"Text: {row['text']}\nRelation:", LETTERS),
}
"""Prompt of a row, and the answer per class, by kind."""


def read_task(config: TaskConfig, data: Path, cache: Path, tokenize: Tokenizer) -> TaskExamples:
    """Return the examples of a task.

    Args:
        config: The task.
        data: Folder of the public data sets.
        cache: Folder for derived data sets.
        tokenize: Returns the token ids of a text, without special tokens.
    """
    folder = data / config.folder
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
        _blocks(_rows(folder, split), tokenize, tokens)
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
    rows = _rows(folder, "train")[: 2 * config.rows]
    facts = [_marked(tokenize(row["prompt"]), tokenize(row["completion"])) for row in rows]
    final, trial = facts[: config.rows], facts[config.rows :]
    return _indexed(trial, trial, final, final)


def _answers(config: TaskConfig, data: Path, cache: Path, tokenize: Tokenizer) -> TaskExamples:
    """Return questions with answers, which are derived if the cache lacks them."""
    if not (cache / config.folder / "test.parquet").exists():
        derive.DATA_SETS[config.folder](data, cache)
    train, validation, test = (
        [_marked(tokenize(row["prompt"]), tokenize(row["completion"])) for row in rows]
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
    ask, answers = QUESTIONS[config.kind]
    tokens = [tokenize(answer) for answer in answers]
    if any(len(ids) != 1 for ids in tokens):
        raise ValueError(f"`answers` must be single tokens, but got {answers} as {tokens}.")
    train, validation, test = (
        [_marked(tokenize(ask(row)), tokens[round(row["label"])]) for row in rows]
        for rows in _judging_rows(config, folder)
    )
    return _indexed(train, validation, train, test)


def _judging_rows(config: TaskConfig, folder: Path) -> list[list[dict[str, Any]]]:
    """Return rows for training, trials and final runs; a missing test split is half of another."""
    train, validation = _rows(folder, "train"), _rows(folder, "validation")
    random.Random(0).shuffle(validation)
    if (folder / "test.parquet").exists():
        test = _rows(folder, "test")
    else:
        half = len(validation) // 2
        validation, test = validation[:half], validation[half:]
    return [train, validation[: config.rows], test[: config.rows]]


def _marked(prompt: Sequence[int], completion: Sequence[int]) -> Marked:
    return [*prompt, *completion], len(prompt)


def _rows(folder: Path, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{split}.parquet").to_pylist()
    return rows


def _indexed(*parts: list[Marked]) -> TaskExamples:
    """Return examples, with labels as positions in the vocabulary of all parts' labels."""
    vocabulary = sorted({token for part in parts for ids, start in part for token in ids[start:]})
    places = {token: place for place, token in enumerate(vocabulary)}
    made: dict[int, Examples] = {}
    for part in parts:
        if id(part) not in made:
            made[id(part)] = _examples(sorted(part, key=lambda marked: len(marked[0])), places)
    return TaskExamples(
        {name: made[id(part)] for name, part in zip(PARTS, parts, strict=True)}, vocabulary
    )


def _examples(part: Iterable[Marked], places: Mapping[int, int]) -> Examples:
    ids, labels = [], []
    for tokens, start in part:
        ids.append(tokens[:-1])
        labels.append([IGNORED] * (start - 1) + [places[token] for token in tokens[start:]])
    return Examples(ids, labels)
