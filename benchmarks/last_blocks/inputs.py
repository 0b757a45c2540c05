r"""Do the statistics of inputs tell which layers, and which examples, gain from rank?

    python -m benchmarks.last_blocks.inputs benchmarks/studies/inputs.toml \
        --data DATA --decoder SMOLLM2

Appends one row per run; a killed process continues. After the last run it prints the correlations,
as Markdown. The exit code is 2 if the time was up before. `--show` counts missing runs instead.
"""

import math
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.last_blocks.arms import DYNAMIC, UNIFORM, WIDE, rows_of, wide_at
from benchmarks.last_blocks.frozen_trunk import IGNORED, CachedExamples, answers, logits_of
from benchmarks.last_blocks.runs import COLUMNS, Runner, describe, loss_in, make_runner, run_options
from benchmarks.last_blocks.tasks import read_screen
from benchmarks.last_blocks.training import Run, Trained
from benchmarks.recovery.arms import layer_costs
from benchmarks.resumable.appended import AppendedTable, Row, read_rows, select
from benchmarks.resumable.time_limit import finish_all
from dynlora.features import InputFeatureAnalyzer
from dynlora.types import UNUSED_KEY, FeatureStats

RESAMPLES = 2000
"""Bootstrap resamples."""
Figures = dict[str, list[float]]
"""Predictors by name, a value per layer or example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A study; the fields are the keys of its file, which explains them."""

    screen: str
    tasks: list[str]
    seeds: list[int]
    batches: int


def describe_examples(run: Run, trained: Trained) -> Row:
    """Return the size of a trained adapter, and the loss of each example that judges it."""
    losses = example_losses(trained.model, run.judge, run.task.head)
    return describe(run, trained) | {"losses": [round(loss, 4) for loss in losses]}


def example_losses(model: nn.Module, data: CachedExamples, head: Tensor) -> list[float]:
    """Return the mean cross-entropy over the labels of each example."""
    found = torch.zeros(len(data.lengths))
    for rows, asked, logits, labels in answers(model, data, head):
        losses = torch.zeros(asked.shape)
        losses[asked] = cross_entropy(logits, labels, reduction="none")
        found[rows] = losses.sum(dim=1) / asked.sum(dim=1)
    return found.tolist()


@torch.no_grad()
def layer_figures(run: Run, batches: int) -> Figures:
    """Return the analyzer's figures of each layer's inputs before training."""
    base = run.task.model.student().eval()
    analyzer, draw = InputFeatureAnalyzer(), torch.Generator().manual_seed(0)

    def observe(name: str, mask: Tensor, inputs: tuple[Tensor], output: Tensor) -> None:
        tokens, outputs = rows_of(inputs[0], mask), rows_of(output, mask)
        keys = torch.randint(UNUSED_KEY, (len(tokens),), generator=draw)
        analyzer.observe(name, keys, lambda kept: (tokens[kept], outputs[kept]))

    names = list(layer_costs(base))
    for rows in islice(run.batches(), batches):
        inputs, labels = run.data.batch(rows)
        mask = inputs["attention_mask"].bool()
        hooks = [
            base.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, name=name, mask=mask: observe(name, mask, inputs, output)
            )
            for name in names
        ]
        logits_of(base, inputs, labels != IGNORED, run.task.head)
        for hook in hooks:
            hook.remove()
    found = analyzer.stats()
    power = [found[name].output_power for name in names]
    return spread([found[name] for name in names]) | {"output power": power}


def example_figures(data: CachedExamples) -> Figures:
    """Return length, and the analyzer's figures of the trunk's outputs, of each example."""
    analyzer = InputFeatureAnalyzer()
    for row, length in enumerate(data.lengths.tolist()):
        states = data.batch([row])[0]["inputs_embeds"][0]
        analyzer.observe(str(row), torch.arange(length), lambda kept, x=states: (x[kept], x[kept]))
    return {"length": data.lengths.tolist()} | spread([*analyzer.stats().values()])


def spread(found: Sequence[FeatureStats]) -> Figures:
    """Return variance and effective rank of each sample of inputs."""
    return {
        "variance": [each.variance for each in found],
        "effective rank": [each.effective_rank for each in found],
    }


def correlations(gains: np.ndarray, figures: Figures) -> dict[str, tuple[float, float, float]]:
    """Return Spearman's correlation of each predictor with the mean gain, and its interval.

    A predictor with equal values, such as ranks that did not move, is left out.

    Args:
        gains: Of shape (seeds, layers or examples).
        figures: Values per layer or example.
    """
    pairs = {name: (np.asarray(values), gains.mean(axis=0)) for name, values in figures.items()}
    pairs = {name: pair for name, pair in pairs.items() if np.ptp(pair[0])}
    pairs["gain with another seed"] = (gains[0], gains[1:].mean(axis=0))
    draws = np.random.default_rng(0).integers(gains.shape[1], size=(RESAMPLES, gains.shape[1]))
    found = {}
    for name, (one, other) in pairs.items():
        drawn = [_spearman(one[rows], other[rows]) for rows in draws]
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        found[name] = (_spearman(one, other), float(low), float(high))
    return found


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    if 0 in (np.ptp(one), np.ptp(other)):
        return math.nan
    return float(stats.spearmanr(one, other).statistic)


def report(study: Inputs, runner: Runner, task: str) -> list[str]:
    """Return the lines of a task's correlations."""
    rows = runner.table.select(task=task)
    loaded, scale = runner.load(task), runner.study.scale
    run = Run(task=loaded, kind="final", learning_rate=0, scale=scale, seed=study.seeds[0])
    costs = layer_costs(run.task.model.student())
    ranks = [row["ranks"] for row in select(rows, arm=DYNAMIC)]
    layers = layer_figures(run, study.batches)
    layers["final rank"] = [float(np.mean([found[name] for found in ranks])) for name in costs]
    by_layer = [_gains(rows, wide_at(name), lambda row: [row["loss"]]) for name in costs]
    per_layer = np.concatenate(by_layer, axis=1) / np.asarray([*costs.values()])
    per_example = _gains(rows, WIDE, lambda row: row["losses"])
    lines = []
    for what, gains, figures in (
        ("layers", per_layer, layers),
        ("examples", per_example, example_figures(run.judge)),
    ):
        for name, (value, low, high) in correlations(gains, figures).items():
            cells = [task, what, name, f"{value:+.2f} ({low:+.2f} to {high:+.2f})"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gains(rows: Sequence[Row], arm: str, read: Callable[[Row], list[float]]) -> np.ndarray:
    """Return how far an arm's losses are below LoRA's, a row per seed."""
    ours = {row["seed"]: np.asarray(read(row)) for row in select(rows, arm=arm)}
    theirs = {row["seed"]: np.asarray(read(row)) for row in select(rows, arm=UNIFORM)}
    return np.stack([theirs[seed] - ours[seed] for seed in sorted(theirs)])


def main() -> int:
    """Execute the missing runs, print the correlations, and return the exit code."""
    parser = run_options(__doc__)
    parser.add_argument("--screen", type=Path, default=Path("benchmarks/results/screen.csv"))
    options = parser.parse_args()
    study = Inputs(**tomllib.loads(options.study.read_text()))
    table = AppendedTable(options.out / f"{options.study.stem}.csv", (*COLUMNS, "losses"))
    runner = make_runner(read_screen(options.study.with_name(study.screen)), table, options)
    runner.describe = describe_examples
    screened = read_rows(options.screen)
    tasks, seeds = options.tasks or study.tasks, options.seeds or study.seeds
    layers = layer_costs(runner.split_model(runner.study.tasks[tasks[0]].kind).student())
    arms = [UNIFORM, WIDE, DYNAMIC, *map(wide_at, layers)]
    if options.show:
        missing = sum(runner.missing(task, [arm], seeds) for task in tasks for arm in arms)
        print(f"{missing} runs are missing")
        return 0

    def finish(task: str, arm: str) -> None:
        tuned = WIDE if arm == WIDE else UNIFORM
        best = min(select(screened, kind="trial", task=task, arm=tuned), key=loss_in)
        runner.finish(task, arm, best["learning_rate"], seeds)

    code = finish_all(finish, product(tasks, arms))
    if code == 0:
        lines = [line for task in tasks for line in report(study, runner, task)]
        head = ["| task | of | predictor | Spearman's correlation with the gain (95 %) |"]
        print("\n".join([*head, "|---|---|---|---|", *lines]))
    return code


if __name__ == "__main__":
    sys.exit(main())
