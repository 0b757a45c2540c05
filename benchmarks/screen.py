r"""Screen tasks: does rank bind, is the need uneven, and how much does `r: auto` need?

    python -m benchmarks.screen benchmarks/studies/screen.toml \
        --data DATA --decoder SMOLLM2 --vision VISION

Appends one row per run; a killed process continues. The exit code is 0 if all runs have ended, and
2 if the time was up before. `--show` prints the number of missing runs instead.
"""

import math
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
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
from benchmarks.frozen_trunk import (
    CachedExamples,
    Decoder,
    SplitModel,
    VisionTransformer,
    evaluate,
    loss_of,
    write_states,
)
from benchmarks.screen_tasks import TaskConfig, read_task
from benchmarks.search import Point, best_of, next_trial
from benchmarks.time_limit import TimeLimit, finish_all, study_options
from dynlora import DynamicLora, DynamicLoraConfig

WIDE = "wide"
"""The arm LoRA at a multiple of r."""
CEILING, AUTO = "ceiling", "auto"
"""The arms LoRA at the ceiling, and a budget searched from there; all others are in `CHOICES`."""
UNIFORM, *ALLOCATIONS = CHOICES
COLUMNS = (
    "kind", "task", "arm", "r", "seed", "learning_rate", "start_loss", "loss", "exact",
    "parameters", "steps",
    "tokens", "tokens_per_parameter", "vocabulary", "seconds", "ranks", "commit", "torch",
)  # fmt: skip


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

    def ranks(self, arm: str, costs: Mapping[str, int]) -> dict[str, int]:
        """Return the rank of each layer that has an adapter."""
        if arm == WIDE:
            return dict.fromkeys(costs, self.wide * self.r)
        if arm in (CEILING, AUTO):
            return dict.fromkeys(costs, self.ceiling)
        return allocate(arm, costs, self.r)


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task with the trunk's outputs."""

    config: TaskConfig
    model: SplitModel
    parts: Mapping[str, CachedExamples]
    head: Tensor
    """Output weights of the task's labels at the start; trained if they require gradients."""


@dataclass(slots=True)
class Runner:
    """Executes missing runs until its time is up."""

    screen: Screen
    table: AppendedTable
    data: Path
    cache: Path
    decoder: Path
    vision: Path | None
    limit: TimeLimit
    loaded: dict[str, LoadedTask] = field(default_factory=dict)
    models: dict[bool, SplitModel] = field(default_factory=dict)
    """The model of texts and the model of images."""

    def finish(self, task: str, criterion: str, seeds: list[int]) -> None:
        """Execute the missing trials and final runs of a criterion on a task.

        Raises:
            TimeUpError: If runs are missing.
        """
        screen = self.screen
        _, rate = self.search(task, [UNIFORM], screen.learning_rates)
        if criterion == "a":
            arms = [(UNIFORM, rate), self.search(task, [WIDE], [rate])]
        elif criterion == "b":
            rates = [rate * factor for factor in screen.allocation_rates]
            arms = [self.search(task, ALLOCATIONS, rates)]
        else:
            ceiling = self.search(task, [CEILING], [rate])
            arms = [ceiling, (AUTO, ceiling[1])]
        for arm, chosen in arms:
            for seed in seeds:
                if self.table.find(kind="final", task=task, arm=arm, seed=seed) is None:
                    self.run("final", task, arm, seed, chosen)

    def search(self, task: str, arms: list[str], rates: list[float]) -> tuple[str, float]:
        """Return the arm and learning rate with the lowest loss, after the missing trials.

        Each arm tries each rate first. Then the best arm widens its rates.

        Raises:
            TimeUpError: If trials are missing.
        """
        first = [(rate, float(place)) for place in range(len(arms)) for rate in rates]
        most = len(first) + self.screen.more_trials
        while True:
            ended = self.trials(task, arms)
            point = next_trial(first, ended, most=most, moving=1)
            if point is None:
                rate, place = best_of(ended)
                return arms[int(place)], rate
            self.run("trial", task, arms[int(point[1])], self.screen.tuning_seed, point[0])

    def trials(self, task: str, arms: list[str]) -> dict[Point, float]:
        """Return the loss per learning rate and place of the arm; infinite if the run diverged."""
        found: dict[Point, float] = {}
        for place, arm in enumerate(arms):
            for row in self.table.select(kind="trial", task=task, arm=arm):
                loss = float(row["loss"])
                point = (row["learning_rate"], float(place))
                found[point] = loss if math.isfinite(loss) else math.inf
        return found

    def run(self, kind: str, task: str, arm: str, seed: int, learning_rate: float) -> None:
        """Execute one run and append its row.

        Raises:
            TimeUpError: If no time is left.
        """
        self.limit.check()
        loaded, start = self.load(task), time.process_time()
        base = loaded.model.student()
        ranks = self.screen.ranks(arm, layer_costs(base))
        row: Row = {"kind": kind, "task": task, "arm": arm, "r": self.screen.r, "seed": seed}
        row |= {"learning_rate": learning_rate, "ranks": ranks, "vocabulary": len(loaded.head)}
        config = {"budget_end": "auto"} if arm == AUTO else FROZEN
        model = get_peft_model(base, _lora(ranks, self.screen.scale, seed))
        row |= train_and_judge(model, config, loaded, kind, learning_rate, seed)
        row |= {"commit": current_commit(), "torch": torch.__version__}
        self.table.append(row | {"seconds": round(time.process_time() - start, 1)})
        print(kind, task, arm, seed, learning_rate, row["loss"], row["exact"], flush=True)

    def load(self, name: str) -> LoadedTask:
        """Return a task, and release the one before it.

        Raises:
            TimeUpError: If the time is up before the trunk's outputs are written.
        """
        if name not in self.loaded:
            config = self.screen.tasks[name]
            model = self.split_model(config.kind)
            tokenizer = AutoTokenizer.from_pretrained(self.decoder)
            found = read_task(
                config,
                self.data,
                self.cache,
                lambda text: tokenizer(text, add_special_tokens=False).input_ids,
            )
            head = model.head(found.vocabulary)
            distinct = {id(part): key for key, part in found.parts.items()}
            opened = {}
            for number, key in distinct.items():
                path = self.cache / f"{name}-{self.screen.blocks}" / key
                if not path.exists():
                    write_states(model, found.parts[key], path, self.limit)
                opened[number] = CachedExamples(found.parts[key], path, head.shape[1])
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
            self.models[images] = made(folder, self.screen.blocks)
        return self.models[images]


def train_and_judge(
    model: nn.Module,
    config: Mapping[str, Any],
    task: LoadedTask,
    kind: str,
    learning_rate: float,
    seed: int,
) -> Row:
    """Train an adapter, and return its loss and size."""
    data, judge = task.parts[f"{kind}_train"], task.parts[f"{kind}_judge"]
    # Facts are judged by the rows that they are learned from.
    validation = judge if task.config.kind == "facts" else task.parts["trial_judge"]
    steps = task.config.epochs * -(-len(data.lengths) // task.config.batch)
    head = task.head.detach().clone().requires_grad_(task.head.requires_grad)
    trained = [p for p in (*model.parameters(), head) if p.requires_grad]
    optimizer = AdamW(trained, lr=learning_rate, weight_decay=0.0)
    rates = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    dynamic = DynamicLora(
        model.train(),
        optimizer,
        DynamicLoraConfig(total_steps=steps, seed=seed, **config),
        validate=lambda: evaluate(model, validation, head)[0],
    )
    row: Row = {}
    if config == FROZEN:
        dynamic.freeze()
    else:
        row["start_loss"] = evaluate(model, judge, head)[0]
        model.train()
    for rows in training_batches(data.lengths, size=task.config.batch, seed=seed, steps=steps):
        loss_of(model, data, rows, head).backward()
        clip_grad_norm_(trained, MAX_GRAD_NORM)
        dynamic.observe()
        optimizer.step()
        dynamic.step()
        rates.step()
        optimizer.zero_grad()
    loss, exact = evaluate(model, judge, head)
    tokens = task.config.epochs * int(data.lengths.sum())
    return row | {
        "loss": loss,
        "exact": exact,
        "parameters": dynamic.parameters,
        "ranks": dynamic.ranks,
        "steps": steps,
        "tokens": tokens,
        "tokens_per_parameter": round(tokens / dynamic.parameters, 2),
    }


def _lora(ranks: Mapping[str, int], scale: float, seed: int) -> LoraConfig:
    """Return a configuration with one scale for all ranks, and draw its weights from the seed."""
    torch.manual_seed(seed)
    highest = max(ranks.values())
    return LoraConfig(
        r=highest,
        lora_alpha=scale * highest,
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern={name: scale * rank for name, rank in ranks.items()},
    )


def count_missing(runner: Runner, wanted: list[tuple[str, str]], seeds: list[int]) -> int:
    """Return the number of missing runs, without trials that widen a search."""
    screen, count = runner.screen, 0
    for task, criterion in wanted:
        if criterion == "a":
            searches = [([UNIFORM], len(screen.learning_rates)), ([WIDE], 1)]
        elif criterion == "b":
            searches = [(ALLOCATIONS, len(ALLOCATIONS) * len(screen.allocation_rates))]
        else:
            searches = [([CEILING], 1), ([AUTO], 0)]
        for arms, trials in searches:
            count += max(0, trials - len(runner.trials(task, arms)))
            rows = [row for arm in arms for row in runner.table.select(task=task, arm=arm)]
            count += len(set(seeds) - {row["seed"] for row in rows if row["kind"] == "final"})
    return count


def read_screen(path: Path) -> Screen:
    """Return the study of a file."""
    values = tomllib.loads(path.read_text())
    tasks = {name: TaskConfig(**given) for name, given in values.pop("tasks").items()}
    return Screen(**values, tasks=tasks)


def main() -> int:
    """Execute the missing runs of the selected tasks and criteria, and return the exit code."""
    parser = study_options(__doc__, "runs/screen")
    parser.add_argument("--decoder", type=Path, required=True, help="folder of SmolLM2-135M")
    parser.add_argument("--vision", type=Path, help="folder of the vision transformer")
    parser.add_argument("--criteria", nargs="+", choices=("a", "b", "c"), default=["a", "b"])
    options = parser.parse_args()
    screen = read_screen(options.study)
    table = AppendedTable(options.out / f"{options.study.stem}.csv", COLUMNS)
    limit = TimeLimit(options.minutes)
    runner = Runner(
        screen, table, options.data, options.cache, options.decoder, options.vision, limit
    )
    wanted = [*product(options.tasks or screen.tasks, options.criteria)]
    wanted.sort(key=lambda cell: cell[1])
    seeds = options.seeds or screen.seeds
    print(f"{count_missing(runner, wanted, seeds)} runs are missing", flush=True)
    if options.show:
        return 0
    return finish_all(runner.finish, ((*cell, seeds) for cell in wanted))


if __name__ == "__main__":
    sys.exit(main())
