"""Screen tasks for two conditions of a gain: rank binds, and the need is uneven.

    python -m benchmarks.screen benchmarks/studies/screen.toml --data DATA --model SMOLLM2

Appends one row per run; a killed process continues. The exit code is 0 if all runs have ended, and
2 if the time was up before. `--show` prints the number of missing runs instead.
"""

import argparse
import math
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

from benchmarks.allocations import CHOICES, allocate
from benchmarks.appended import AppendedTable, Row, current_commit
from benchmarks.arms import FROZEN, MAX_GRAD_NORM, WARMUP, layer_costs
from benchmarks.batches import training_batches
from benchmarks.frozen_trunk import CachedExamples, Decoder, evaluate, loss_of
from benchmarks.screen_tasks import TaskConfig, read_task
from benchmarks.search import Point, best_of, next_trial
from benchmarks.time_limit import TimeLimit, finish_all, study_options
from dynlora import DynamicLora, DynamicLoraConfig

WIDE = "wide"
"""The arm LoRA at a multiple of r; all other arms are names in `CHOICES`."""
ARMS = ("uniform", WIDE, *list(CHOICES)[1:])
COLUMNS = (
    "kind", "task", "arm", "r", "seed", "learning_rate", "loss", "exact", "parameters", "steps",
    "tokens", "tokens_per_parameter", "vocabulary", "seconds", "ranks", "commit", "torch",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """A screen; the fields are the keys of its file, which explains them."""

    r: int
    wide: int
    blocks: int
    scale: float
    learning_rates: list[list[float]]
    most_trials: int
    tuning_seed: int
    seeds: list[int]
    tasks: dict[str, TaskConfig]

    def ranks(self, arm: str, costs: Mapping[str, int]) -> dict[str, int]:
        """Return the rank of each layer that has an adapter."""
        if arm == WIDE:
            return dict.fromkeys(costs, self.wide * self.r)
        return allocate(arm, costs, self.r)


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task with the trunk's outputs."""

    config: TaskConfig
    parts: Mapping[str, CachedExamples]
    head: Tensor
    """Output embeddings of the task's tokens."""


@dataclass(slots=True)
class Runner:
    """Executes missing runs until its time is up."""

    screen: Screen
    table: AppendedTable
    data: Path
    cache: Path
    model: Path
    limit: TimeLimit
    loaded: dict[str, LoadedTask] = field(default_factory=dict)
    decoder: Decoder | None = None

    def finish(self, task: str, arm: str, seeds: list[int]) -> None:
        """Execute the missing trials and final runs of an arm on a task.

        Raises:
            TimeUpError: If runs are missing.
        """
        screen, most = self.screen, self.screen.most_trials
        while True:
            ended = self.trials(task, arm)
            point = next_trial(screen.learning_rates, ended, most=most, moving=1)
            if point is None:
                break
            self.run("trial", task, arm, screen.tuning_seed, point)
        for seed in seeds:
            if self.table.find(kind="final", task=task, arm=arm, seed=seed) is None:
                self.run("final", task, arm, seed, best_of(ended))

    def trials(self, task: str, arm: str) -> dict[Point, float]:
        """Return the loss per learning rate; infinite if the run diverged."""
        rows = self.table.select(kind="trial", task=task, arm=arm)
        losses = {(row["learning_rate"],): float(row["loss"]) for row in rows}
        return {point: x if math.isfinite(x) else math.inf for point, x in losses.items()}

    def run(self, kind: str, task: str, arm: str, seed: int, point: Point) -> None:
        """Execute one run and append its row.

        Raises:
            TimeUpError: If no time is left.
        """
        self.limit.check()
        loaded, start = self.load(task), time.process_time()
        assert self.decoder is not None
        base = self.decoder.student()
        ranks = self.screen.ranks(arm, layer_costs(base))
        row: Row = {"kind": kind, "task": task, "arm": arm, "r": self.screen.r, "seed": seed}
        row |= {"learning_rate": point[0], "ranks": ranks, "vocabulary": len(loaded.head)}
        row |= train_and_judge(base, ranks, loaded, kind, self.screen.scale, point[0], seed)
        row |= {"commit": current_commit(), "torch": torch.__version__}
        self.table.append(row | {"seconds": round(time.process_time() - start, 1)})
        print(kind, task, arm, seed, point, row["loss"], row["exact"], flush=True)

    def load(self, name: str) -> LoadedTask:
        """Return a task, and release the one before it.

        Raises:
            TimeUpError: If the time is up before the trunk's outputs are written.
        """
        if name not in self.loaded:
            self.decoder = self.decoder or Decoder(self.model, self.screen.blocks)
            config = self.screen.tasks[name]
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            found = read_task(
                config, self.data, lambda text: tokenizer(text, add_special_tokens=False).input_ids
            )
            head = self.decoder.vocabulary[found.vocabulary]
            distinct = {id(part): key for key, part in found.parts.items()}
            opened = {}
            for number, key in distinct.items():
                path = self.cache / name / key
                if not path.exists():
                    self.decoder.write_states(found.parts[key], path, self.limit)
                opened[number] = CachedExamples(found.parts[key], path, head.shape[1])
            parts = {key: opened[id(part)] for key, part in found.parts.items()}
            self.loaded = {name: LoadedTask(config, parts, head)}
        return self.loaded[name]


def train_and_judge(
    base: nn.Module,
    ranks: Mapping[str, int],
    task: LoadedTask,
    kind: str,
    scale: float,
    learning_rate: float,
    seed: int,
) -> Row:
    """Train an adapter of these ranks, and return its loss and size."""
    data = task.parts[f"{kind}_train"]
    steps = task.config.epochs * -(-len(data.lengths) // task.config.batch)
    torch.manual_seed(seed)
    model: Any = get_peft_model(base, _lora(ranks, scale))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=learning_rate, weight_decay=0.0)
    rates = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    dynamic = DynamicLora(model.train(), optimizer, DynamicLoraConfig(total_steps=steps, **FROZEN))
    dynamic.freeze()
    for rows in training_batches(data.lengths, size=task.config.batch, seed=seed, steps=steps):
        loss_of(model, data, rows, task.head).backward()
        clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    loss, exact = evaluate(model, task.parts[f"{kind}_judge"], task.head)
    tokens = task.config.epochs * int(data.lengths.sum())
    return {
        "loss": loss,
        "exact": exact,
        "parameters": dynamic.parameters,
        "steps": steps,
        "tokens": tokens,
        "tokens_per_parameter": round(tokens / dynamic.parameters, 2),
    }


def _lora(ranks: Mapping[str, int], scale: float) -> LoraConfig:
    """Return a configuration with one scale for all ranks."""
    highest = max(ranks.values())
    return LoraConfig(
        r=highest,
        lora_alpha=scale * highest,
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern={name: scale * rank for name, rank in ranks.items()},
    )


def cells(screen: Screen, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield tasks and arms: first all that criterion a needs, then fixed allocations."""
    tasks, arms = options.tasks or list(screen.tasks), options.arms or ARMS
    for first in (True, False):
        for task in tasks:
            yield from ((task, arm) for arm in arms if (arm in ARMS[:2]) == first)


def count_missing(runner: Runner, wanted: list[tuple[str, str]], seeds: list[int]) -> int:
    """Return the number of missing runs, without trials that widen a search."""
    count = 0
    for task, arm in wanted:
        ended = runner.trials(task, arm)
        count += sum(tuple(point) not in ended for point in runner.screen.learning_rates)
        rows = runner.table.select(kind="final", task=task, arm=arm)
        count += len(set(seeds) - {row["seed"] for row in rows})
    return count


def read_screen(path: Path) -> Screen:
    """Return the study of a file."""
    values = tomllib.loads(path.read_text())
    tasks = {name: TaskConfig(**given) for name, given in values.pop("tasks").items()}
    return Screen(**values, tasks=tasks)


def main() -> int:
    """Execute the missing runs of the selected tasks and arms, and return the exit code."""
    parser = study_options(__doc__, "runs/screen")
    parser.add_argument("--model", type=Path, required=True, help="folder of the decoder")
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    options = parser.parse_args()
    screen = read_screen(options.study)
    table = AppendedTable(options.out / f"{options.study.stem}.csv", COLUMNS)
    limit = TimeLimit(options.minutes)
    runner = Runner(screen, table, options.data, options.cache, options.model, limit)
    wanted, seeds = list(cells(screen, options)), options.seeds or screen.seeds
    print(f"{count_missing(runner, wanted, seeds)} runs are missing", flush=True)
    if options.show:
        return 0
    return finish_all(runner.finish, ((task, arm, seeds) for task, arm in wanted))


if __name__ == "__main__":
    sys.exit(main())
