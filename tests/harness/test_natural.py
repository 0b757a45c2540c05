"""The comparison on natural tasks: arms end at their size, tuning is equal, and claims follow."""

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from benchmarks.last_blocks.arms import ADALORA_SCALE, make_adapter
from benchmarks.last_blocks.frozen_trunk import (
    IGNORED,
    CachedExamples,
    Decoder,
    Examples,
    evaluate,
    write_states,
)
from benchmarks.last_blocks.natural import Comparison, Natural, describe_moves
from benchmarks.last_blocks.natural_report import (
    dynamic_lines,
    falling_lines,
    random_lines,
    split_moved,
)
from benchmarks.last_blocks.runs import COLUMNS, Runner
from benchmarks.last_blocks.tasks import TaskConfig, read_screen
from benchmarks.last_blocks.training import LoadedTask, Run, train
from benchmarks.recovery.arms import layer_costs
from benchmarks.recovery.controls_report import losses_by_arm
from benchmarks.resumable.appended import AppendedTable
from benchmarks.resumable.time_limit import TimeLimit
from tests.models import bare_llama

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
SCREEN = read_screen(STUDIES / "screen.toml")
R = SCREEN.r
STUDY = Natural(**tomllib.loads((STUDIES / "natural.toml").read_text()))
LORA, ARMS = (
    {"uniform": R, "double": 2 * R, "wide": 4 * R},
    ("dynamic", "falling", "adalora", "eva"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run that learns to repeat a text's first two tokens."""
    folder = tmp_path_factory.mktemp("natural")
    bare_llama(layers=3).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 16, (80, 6), generator=generator).tolist()
    labels = [[IGNORED] * 4 + [ids[0], ids[1]] for ids in texts]
    model, examples = Decoder(folder, blocks=2), Examples(texts, labels)
    write_states(model, examples, folder / "states", TimeLimit(1))
    data = CachedExamples(examples, folder / "states", 32)
    parts = dict.fromkeys(("trial_train", "trial_judge", "final_train", "final_judge"), data)
    config = TaskConfig(kind="text", folder="", batch=8, epochs=6)
    task = LoadedTask(config, model, parts, model.head(list(range(16))))
    return Run(task=task, kind="final", learning_rate=0.02, scale=SCREEN.scale, seed=1)


@pytest.mark.parametrize(
    "arm", ["double", "dynamic", "open", "falling", "adalora", "eva", "eva uniform", "eva dynamic"]
)
def test_every_arm_learns_at_its_scale_and_ends_at_its_size(run, arm):
    costs = layer_costs(run.task.model.student())
    at_r, ranks_at_r = R * sum(costs.values()), R * len(costs)
    run = replace(run, learning_rate=run.learning_rate * STUDY.centres.get(arm, 1.0))
    adapter = make_adapter(arm, SCREEN, run)
    start = evaluate(adapter.model, run.judge, run.task.head).loss
    trained = train(adapter, run)
    assert trained.judged.loss < 0.9 * start
    row, ranks = describe_moves(run, trained), trained.controller.ranks
    sizes = {"parameters": sum(costs[name] * rank for name, rank in ranks.items())}
    sizes["peak_parameters"] = sizes["parameters"]
    match arm:
        case "dynamic" | "open" | "eva dynamic":
            assert at_r - max(costs.values()) < sizes["parameters"] <= at_r
            sizes["peak_parameters"] = at_r
        case "falling":
            assert at_r - max(costs.values()) < sizes["parameters"] <= at_r
            sizes["peak_parameters"] = 4 * at_r
        case "adalora":
            assert sum(ranks.values()) == ranks_at_r
            sizes["parameters"] += ranks_at_r  # a singular value per rank
            sizes["peak_parameters"] = 3 * (sum(costs.values()) + len(costs))
        case "eva":
            assert sum(ranks.values()) == ranks_at_r
            assert ranks != dict.fromkeys(costs, R)
        case "eva uniform":
            assert ranks == dict.fromkeys(costs, R)
        case _:
            assert ranks == dict.fromkeys(costs, 2 * R)
    assert {key: row[key] for key in sizes} == sizes
    history = trained.controller.history
    assert bool(history) == (arm in ("dynamic", "open", "falling", "eva dynamic"))
    assert row["moved"] == (arm in ("dynamic", "open", "falling"))  # no evidence in `eva dynamic`
    last = history[-1].step / run.steps if history else 0
    assert (last > 0.9) == (arm == "open")
    layers = [m for m in adapter.model.modules() if isinstance(m, LoraLayer)]
    divisor = 3 * ADALORA_SCALE if arm == "adalora" else 1  # its forward divides by the rank
    assert {layer.scaling["default"] / divisor for layer in layers} == {SCREEN.scale}


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """Return a comparison whose runs take no time; the best rate is 0.032, of `eva` 0.1024."""

    def run(self, kind, task, arm, seed, learning_rate):
        loss = 1 + abs(np.log2(learning_rate / (0.1024 if arm == "eva" else 0.032)))
        row = {"kind": kind, "task": task, "arm": arm, "seed": seed}
        self.table.append(row | {"learning_rate": learning_rate, "loss": loss})

    monkeypatch.setattr(Runner, "run", run)
    table = AppendedTable(tmp_path / "natural.csv", COLUMNS)
    runner = Runner(SCREEN, table, tmp_path, tmp_path, tmp_path, None, TimeLimit(1))
    trials = {"uniform": (0.004, 0.008, 0.016, 0.032, 0.064), "wide": (0.008, 0.016, 0.032)}
    screened = [
        {"kind": "trial", "task": "german", "arm": arm, "seed": 150, "learning_rate": rate}
        | {"loss": 1 + abs(np.log2(rate / 0.016)), "commit": "screen"}
        for arm, rates in trials.items()
        for rate in rates
    ]
    return Comparison(STUDY, runner, screened)


def test_every_arm_has_equal_trials_and_fresh_seeds_and_repeats_no_trial_of_the_screen(comparison):
    runner, seeds = comparison.runner, STUDY.seeds
    assert not {*seeds} & {*SCREEN.seeds, SCREEN.tuning_seed}
    assert len(seeds) == 10
    for arm in STUDY.arms:
        assert comparison.missing("german", arm, seeds) >= 10
        comparison.finish("german", arm, seeds)
        assert comparison.missing("german", arm, seeds) == 0
        rates = [row["learning_rate"] for row in runner.table.select(kind="trial", arm=arm)]
        chosen = {row["learning_rate"] for row in runner.table.select(kind="final", arm=arm)}
        assert len(rates) == len({*rates}) >= 6
        assert {factor * rate for rate in chosen for factor in (0.5, 2.0)} <= {*rates}
        assert {*comparison.rates("german", arm)} <= {*rates}
    copied = runner.table.select(commit="screen")
    assert [row["arm"] for row in copied] == ["uniform"] * 5 + ["wide"] * 3


def test_a_comparison_at_another_rank_copies_the_trials_of_lora_at_that_rank(comparison):
    screened = [row | {"arm": "ceiling"} for row in comparison.screened if row["arm"] == "uniform"]
    wider = replace(STUDY, r=SCREEN.ceiling)
    replace(comparison, study=wider, screened=screened).finish("german", "uniform", STUDY.seeds)
    copied = comparison.runner.table.select(commit="screen")
    assert [(row["arm"], row["r"]) for row in copied] == [("uniform", 16)] * 5


def rows_of(task, losses, moved=(True,) * 10, r=R):
    """Return final runs with these mean losses per arm, and equal noise per seed."""
    noise = np.random.default_rng(0).normal(scale=0.01, size=(len(losses), 10))
    return [
        {"kind": "final", "task": task, "r": r, "arm": arm, "seed": seed}
        | {"loss": loss + noise[place, seed], "moved": moved[seed]}
        for place, (arm, loss) in enumerate(losses.items())
        for seed in range(10)
    ]


def test_a_win_needs_half_of_the_gain_of_twice_the_rank():
    better = {"uniform": 1.0, "double": 0.9, "dynamic": 0.94, "falling": 0.9}
    rows = [
        *rows_of("win", better),
        *rows_of("little", better | {"double": 0.8}),
        *rows_of("worse", better | {"dynamic": 1.05, "falling": 1.01}),
        *rows_of("same", better | {"dynamic": 1.0}),
    ]
    lines = dynamic_lines(losses_by_arm(rows, "loss"), [])
    claims = {line.split(" | ")[0][2:]: line.split(" | ")[-1][:-2] for line in lines}
    assert claims == {"win": "win", "little": "undecided", "worse": "worse", "same": "undecided"}
    assert "| 0.008 | 0.58" in lines[0]  # 2 / 2**10, four tasks
    *falling, mean = falling_lines(losses_by_arm(rows, "loss"), [])
    better = [line.split(" | ")[3] for line in falling]
    assert better[:3] == ["dynamic", "dynamic", "uniform"]
    shown = [float(line.split(" | ")[4].split("%")[0]) for line in (*falling, mean)]
    assert np.mean(shown[:4]) == pytest.approx(shown[4], abs=0.01)


def test_dynamic_ranks_are_compared_with_random_ones_where_these_ran():
    rows = rows_of("cities", {"uniform": 1.0, "dynamic": 0.9, "random": 0.95})
    (line,) = random_lines(losses_by_arm([*rows, *rows_of("stsb", {"dynamic": 1.0})], "loss"))
    task, pairs, shown = line.strip("| ").split(" | ")
    assert (task, pairs) == ("cities", "10")
    assert float(shown.split("%")[0]) == pytest.approx(-5, abs=2)


def test_runs_that_moved_nothing_are_apart():
    rows = rows_of("german", {"uniform": 1.0, "dynamic": 0.9}, moved=(False,) * 3 + (True,) * 7)
    for kept, pairs in zip(split_moved(rows), ("7", "3"), strict=True):
        (line,) = dynamic_lines(losses_by_arm(kept, "loss"), [])
        assert line.split(" | ")[2] == pairs
