"""`dynlora advise`: whether a rank is enough, within a time limit, and nothing written."""

from itertools import count

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

from dynlora.cli.main import main
from dynlora.train.advise import Size, advise_rank, choose_size, interval_of
from dynlora.train.tasks.sequence import mean_of_tokens
from tests.jobs import job_values, make_rows, missing, parse_job, snapshot, write_job, write_rows

KEYS = {
    "r", "higher_r", "verdict", "learned", "gain", "interval", "gains", "threshold", "seeds",
    "steps", "batch", "rows", "limit_seconds", "seconds",
}  # fmt: skip


@pytest.fixture
def planted(monkeypatch, model, tmp_path):
    """Return a function that writes a job of two pairs of runs, with r = 1.

    Its labels are the model's embeddings with noise, after a change of all its feed-forward layers,
    of full rank and this size, and a shift of all embeddings.
    """
    monkeypatch.setattr("dynlora.train.advise.MOST_SEEDS", 2)

    @torch.no_grad()
    def write(change, shift=0.0):
        tokenizer, teacher = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model)
        torch.manual_seed(3)
        for block in teacher.eval().encoder.layer:
            for layer in (block.intermediate.dense, block.output.dense):
                layer.weight += change * torch.randn(layer.weight.shape)
        direction = shift * torch.randn(teacher.config.hidden_size)
        for seed, split in enumerate(("train", "validation")):
            rows = make_rows(120, seed=seed)
            inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
            labels = mean_of_tokens(teacher(**inputs).last_hidden_state, inputs["attention_mask"])
            labels += direction + 0.1 * torch.randn(labels.shape)
            pairs = zip(rows, labels.tolist(), strict=True)
            write_rows(tmp_path / "data" / f"{split}.jsonl", [a | {"label": b} for a, b in pairs])
        values = job_values(model, tmp_path / "data", tmp_path / "run")
        values |= {"task": "embedding", "lora": {"r": 1, "lora_alpha": 4}}
        values["training"] |= {"epochs": 2, "batch_size": 12}
        return write_job(tmp_path / "job.yaml", values)

    return write


def test_a_task_that_needs_rank_is_told_to_take_more_and_nothing_is_written(
    planted, said, tmp_path
):
    job = planted(change=0.3)
    before = snapshot(tmp_path)
    found = said("advise", job, "--training.epochs", 4, "--training.learning_rate", 3e-2)
    assert snapshot(tmp_path) == before
    assert set(found) == KEYS
    assert (found["r"], found["higher_r"], found["verdict"]) == (1, 4, "too low")
    assert found["threshold"] == 0.02 < found["interval"][0] < found["gain"]
    assert found["steps"] == {"trained": 40, "job": 40}
    assert found["rows"] == {"trained": 120, "job": 120, "validation": 120}
    assert found["seconds"] < found["limit_seconds"] == 120
    assert found["gain"] == pytest.approx(np.mean(found["gains"]))


def test_a_task_without_need_is_told_that_its_rank_is_enough(planted, capsys):
    job = planted(change=0, shift=0.1)
    assert main(["advise", str(job), "--training.learning_rate", "2e-3"]) == 0
    out = capsys.readouterr().out
    told = "r = 1 is enough: r = 4 would lower the validation loss by | (95 % interval"
    assert missing(out, told, "2 seeds", "120 of 120 rows in 20 of 20 steps") == []


def test_nothing_is_said_about_a_task_that_is_not_learned(planted, capsys):
    assert main(["advise", str(planted(change=0))]) == 0  # the model begins with all there is
    told = "It is not clear whether r = 1 is enough: runs of this size learn too little"
    assert missing(capsys.readouterr().out, told) == []


def test_a_job_with_limits_of_rank_and_budget_is_compared_without_a_search(planted, monkeypatch):
    def refuse(trainer):
        raise AssertionError("short runs search no budget")

    monkeypatch.setattr("dynlora.train.build.validation_loss", refuse)
    limits = ("--dynamic.budget_end", "auto", "--dynamic.max_rank", 2)
    config = parse_job(planted(change=0.3), *limits)
    assert advise_rank(config, Console(quiet=True))["verdict"] != "enough"


def test_a_job_of_adalora_is_compared_at_ranks_above_its_initial_one(planted):
    own = ("--method", "adalora", "--adalora.init_r", 3)
    found = advise_rank(parse_job(planted(change=0.3), *own), Console(quiet=True))
    assert (found["higher_r"], found["seeds"]) == (4, 2)


def test_the_runs_fit_into_the_time(planted):
    """Every look at the clock, one per step, takes a second."""
    config = parse_job(planted(change=0.3))
    clock = map(float, count()).__next__
    found = advise_rank(config, Console(quiet=True), seconds=50, clock=clock)
    assert 30 < found["seconds"] <= 50
    assert found["seeds"] == 1
    assert 8 <= found["steps"]["trained"] < 20
    assert found["rows"]["trained"] == 120 * found["steps"]["trained"] / 20


def test_too_little_time_is_told(planted, capsys):
    assert main(["advise", str(planted(change=0.3)), "--minutes", "0.001"]) == 0
    told = "It is not clear whether r = 1 is enough: the time was too short; raise `--minutes`"
    assert missing(capsys.readouterr().out, told) == []


def test_a_job_of_a_single_step_has_no_answer(planted):
    config = parse_job(planted(change=0.3), "--training.max_steps", 1)
    assert advise_rank(config, Console(quiet=True))["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("seconds", "step_seconds", "expected"),
    [
        (0.1, {4: 1.0, 32: 1.0}, Size(batch=32, steps=2)),  # half of them before the cut
        (50, {4: 1.0, 32: 1.0}, Size(batch=32, steps=50)),  # small batches save no time
        (100, {4: 0.25, 32: 2.0}, Size(batch=21, steps=76)),
        (15, {4: 0.25, 32: 2.0}, Size(batch=5, steps=48)),
        (200, {4: 0.25, 32: 2.0}, Size(batch=32, steps=100)),  # the whole job fits
    ],
)
def test_steps_are_kept_before_rows(seconds, step_seconds, expected):
    assert choose_size(seconds, Size(batch=32, steps=100), step_seconds) == expected


@pytest.mark.parametrize("change", [0.0, 0.02])
def test_at_least_nineteen_of_twenty_intervals_contain_the_gain(change):
    noise, inside = np.random.default_rng(0), 0
    for _ in range(400):
        rows = 1 + 0.5 * noise.standard_normal(50)  # the same for all pairs
        pairs = 0.01 * noise.standard_normal((2, 1)) + change * noise.standard_normal()
        drops = (0.03 * rows + pairs + 0.02 * noise.standard_normal((2, 50))) / 50
        low, high = interval_of(drops, change=change, unseen=1.0)
        inside += low < 0.03 < high
    assert 0.94 * 400 < inside < 0.995 * 400


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "full"], "`method` must have a rank for advice about it, but got full."),
        (["--lora.start_from", "adapter"], "`lora.start_from` must be null for advice"),
        (
            ["--method", "lora", "--lora.init_lora_weights", "olora"],
            "`lora.init_lora_weights` must be an initialization that keeps the base weights, for "
            "advice from runs that cut ranks, but got olora. Leave it out.",
        ),
    ],
)
def test_jobs_without_a_new_rank_that_can_fall_are_refused_untrained(
    refused, job, options, told, monkeypatch
):
    monkeypatch.setattr("dynlora.train.advise.build_trainer", None)
    assert told in refused("advise", job, *options)
