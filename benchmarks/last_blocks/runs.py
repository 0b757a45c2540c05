"""Runs of the screen's arms: cached tasks, searches of learning rates, and one row per run."""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.last_blocks.arms import AUTO, make_adapter
from benchmarks.last_blocks.frozen_trunk import (
    CachedExamples,
    Decoder,
    SplitModel,
    VisionTransformer,
    evaluate,
    write_states,
)
from benchmarks.last_blocks.tasks import Screen, read_task
from benchmarks.last_blocks.training import LoadedTask, Run, Trained, train
from benchmarks.resumable.appended import AppendedTable, Row, current_commit
from benchmarks.resumable.search import Point, best_of, next_trial
from benchmarks.resumable.time_limit import TimeLimit, study_options
from dynlora.errors import NonFiniteError

COLUMNS = (
    "kind", "task", "arm", "r", "seed", "learning_rate", "start_loss", "loss", "exact",
    "parameters", "steps",
    "tokens", "tokens_per_parameter", "vocabulary", "seconds", "ranks", "commit", "torch",
)  # fmt: skip


def describe(_run: Run, trained: Trained) -> Row:
    """Return the size of a trained adapter."""
    controller = trained.controller
    return {"parameters": controller.parameters, "ranks": controller.ranks}


@dataclass(slots=True)
class Runner:
    """Executes missing runs until its time is up."""

    study: Screen
    table: AppendedTable
    data: Path
    cache: Path
    decoder: Path
    vision: Path | None
    limit: TimeLimit
    describe: Callable[[Run, Trained], Row] = describe
    """Returns a row's values that depend on the trained adapter."""
    loaded: dict[str, LoadedTask] = field(default_factory=dict)
    models: dict[bool, SplitModel] = field(default_factory=dict)
    """The model of texts and the model of images."""

    def finish(self, task: str, arm: str, learning_rate: float, seeds: Sequence[int]) -> None:
        """Execute the missing final runs of an arm on a task.

        Raises:
            TimeUpError: If runs are missing.
        """
        for seed in seeds:
            if self.table.find(kind="final", task=task, arm=arm, seed=seed) is None:
                self.run("final", task, arm, seed, learning_rate)

    def search(self, task: str, arms: list[str], rates: list[float]) -> tuple[str, float]:
        """Return the arm and learning rate with the lowest loss, after the missing trials.

        Each arm tries each rate first. Then the best arm widens its rates.

        Raises:
            TimeUpError: If trials are missing.
        """
        first = [(rate, float(place)) for place in range(len(arms)) for rate in rates]
        most = len(first) + self.study.more_trials
        while True:
            ended = self.trials(task, arms)
            point = next_trial(first, ended, most=most, moving=1)
            if point is None:
                rate, place = best_of(ended)
                return arms[int(place)], rate
            self.run("trial", task, arms[int(point[1])], self.study.tuning_seed, point[0])

    def trials(self, task: str, arms: list[str]) -> dict[Point, float]:
        """Return the loss per learning rate and place of the arm; infinite if the run diverged."""
        found: dict[Point, float] = {}
        for place, arm in enumerate(arms):
            for row in self.table.select(kind="trial", task=task, arm=arm):
                found[row["learning_rate"], float(place)] = loss_in(row)
        return found

    def missing(self, task: str, arms: list[str], seeds: Sequence[int]) -> int:
        """Return the number of seeds without a final run of any of these arms."""
        rows = [row for arm in arms for row in self.table.select(kind="final", task=task, arm=arm)]
        return len(set(seeds) - {row["seed"] for row in rows})

    def run(self, kind: str, task: str, arm: str, seed: int, learning_rate: float) -> None:
        """Execute one run and append its row.

        Raises:
            TimeUpError: If no time is left.
        """
        self.limit.check()
        loaded, start = self.load(task), time.process_time()
        run = Run(
            task=loaded, kind=kind, learning_rate=learning_rate, scale=self.study.scale, seed=seed
        )
        row: Row = {"kind": kind, "task": task, "arm": arm, "r": self.study.r, "seed": seed}
        row |= {"learning_rate": learning_rate, "vocabulary": len(loaded.head), "steps": run.steps}
        row |= self.measure(arm, run)
        row |= {"commit": current_commit(), "torch": torch.__version__}
        self.table.append(row | {"seconds": round(time.process_time() - start, 1)})
        print(kind, task, arm, seed, learning_rate, row["loss"], row.get("exact"), flush=True)

    def measure(self, arm: str, run: Run) -> Row:
        """Train, and return losses and size."""
        adapter, row = make_adapter(arm, self.study, run), Row()
        if arm == AUTO:
            row["start_loss"] = evaluate(adapter.model, run.judge, run.task.head).loss
        try:
            trained = train(adapter, run)
        except NonFiniteError:
            return {"loss": math.inf}
        row |= {"loss": trained.judged.loss, "exact": trained.judged.exact}
        tokens = run.task.config.epochs * int(run.data.lengths.sum())
        row |= {"tokens": tokens} | self.describe(run, trained)
        return row | {"tokens_per_parameter": round(tokens / row["parameters"], 2)}

    def load(self, name: str) -> LoadedTask:
        """Return a task, and release the one before it.

        Raises:
            TimeUpError: If the time is up before the trunk's outputs are written.
        """
        if name not in self.loaded:
            config = self.study.tasks[name]
            model = self.split_model(config.kind)
            tokenizer = AutoTokenizer.from_pretrained(self.decoder)
            found = read_task(
                config,
                self.data,
                self.cache,
                lambda text: tokenizer(text, add_special_tokens=False).input_ids,
            )
            head = model.head(found.vocabulary)
            opened = {}
            for part in found.parts.values():
                path = self.cache / f"{self.study.blocks}-{part.digest}"
                if not path.exists():
                    write_states(model, part, path, self.limit)
                opened[id(part)] = CachedExamples(part, path, head.shape[1])
            parts = {key: opened[id(part)] for key, part in found.parts.items()}
            self.loaded = {name: LoadedTask(config, model, parts, head)}
        return self.loaded[name]

    def split_model(self, kind: str) -> SplitModel:
        """Return the model for a kind of task."""
        images = kind == "images"
        folder = self.vision if images else self.decoder
        if folder is None:
            raise SystemExit("`--vision` must name a folder for a task with images, but got none.")
        if images not in self.models:
            made = VisionTransformer if images else Decoder
            self.models[images] = made(folder, self.study.blocks)
        return self.models[images]


def loss_in(row: Row) -> float:
    """Return the loss of a row; infinite if the run diverged."""
    loss = float(row["loss"])
    return loss if math.isfinite(loss) else math.inf


def run_options(description: str | None) -> argparse.ArgumentParser:
    """Return the options of a program that executes runs."""
    parser = study_options(description, "runs/screen")
    parser.add_argument("--decoder", type=Path, required=True, help="folder of SmolLM2-135M")
    parser.add_argument("--vision", type=Path, help="folder of the vision transformer")
    return parser


def make_runner(study: Screen, table: AppendedTable, options: argparse.Namespace) -> Runner:
    """Return a runner with the folders and the time limit of the command line."""
    limit = TimeLimit(options.minutes)
    return Runner(study, table, options.data, options.cache, options.decoder, options.vision, limit)
