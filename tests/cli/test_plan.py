"""`dynlora plan` and `dynlora train --dry-run`: what a job would do, and nothing written."""

import re
import shutil
import signal
import sys

import pytest
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

from dynlora.cli.main import main
from tests.cli.finished import facts, finish
from tests.jobs import (
    job_values,
    measure_here,
    missing,
    snapshot,
    write_data,
    write_job,
    write_rows,
)
from tests.language import language_job, save_language_model, write_pairs
from tests.pictures import picture_rows, save_vit
from tests.processes import run_in_group

METHODS = ["dynamic", "lora", "adalora", "full"]
DEATHS = {
    "lora": ("os.kill(os.getpid(), 9)", "the process was killed: most likely memory ran out"),
    "adalora": (f"os.kill(os.getpid(), {int(signal.SIGALRM)})", "stopped after 3600 seconds"),
    "full": ("raise MemoryError('no room for 9 bytes')", "MemoryError: no room for 9 bytes"),
}
CHILD = """
import json, os, pickle, sys
config = pickle.load(sys.stdin.buffer)
print("a library says something")
exec({deaths}.get(config.method, ""))
print(json.dumps({{"peak_memory_bytes": 3 * 2**30, "peak_gpu_memory_bytes": {gpu}}}))
"""
"""Child that dies with some methods and reports 3 GiB with others."""


@pytest.fixture
def plan(job, said, tmp_path):
    """Return a runner of `dynlora plan --json`, which writes nothing; it returns its output."""

    def run(*options, config=job):
        before = snapshot(tmp_path)
        values = said("plan", config, *options)
        assert snapshot(tmp_path) == before
        return values

    return run


@pytest.fixture
def children(monkeypatch):
    def replace(deaths, gpu=None):
        command = (sys.executable, "-c", CHILD.format(deaths=deaths, gpu=gpu))
        monkeypatch.setattr("dynlora.train.plan.COMMAND", command)

    return replace


def test_the_plan_has_the_exact_parameters_and_agrees_with_the_run(plan, model, finished):
    planned, run = plan(), facts(finished)
    methods = planned["methods"]
    assert list(methods) == METHODS
    base = BertForSequenceClassification.from_pretrained(model)
    everything = sum(parameter.numel() for parameter in base.parameters())
    stock = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    trained = sum(p.numel() for p in stock.parameters() if p.requires_grad)
    total = sum(p.numel() for p in stock.parameters())
    for method, sizes in {
        "full": (everything, everything),
        "lora": (trained, total),
        "dynamic": (trained, total),
    }.items():
        assert (methods[method]["trainable"], methods[method]["total"]) == sizes
    for key in ("rows", "steps", "num_labels"):
        assert planned[key] == run[key]
    assert methods["dynamic"]["budget"] == run["budget"]
    assert methods["dynamic"]["start"] == run["parameters"]["start"]
    assert plan("--output", finished) == planned, "a run in `output` is no hindrance"


def test_a_falling_budget_is_planned_as_the_run_begins_and_ends(plan, model, data, tmp_path):
    falling = ["--dynamic.budget_end", 0.5]
    planned = plan(*falling)["methods"]["dynamic"]
    run = facts(finish(tmp_path / "falling", model, data, *falling))
    assert planned["end"] == planned["budget"] // 2
    assert run["parameters"] == {
        "start": planned["budget"], "peak": planned["budget"], "end": planned["end"],
    }  # fmt: skip
    assert planned["budget"] == run["budget"]


def test_the_configured_method_comes_first_and_others_say_why_not(plan):
    values = plan("--method", "lora", "--dynamic.min_rank", 3)
    assert list(values["methods"]) == ["lora", "adalora", "full"]
    assert list(values["impossible"]) == ["dynamic"]
    assert "lower `min_rank`" in values["impossible"]["dynamic"]


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("image_classification", ["--training.gradient_accumulation=3", "--training.bf16=true"]),
        (
            "causal_lm",
            ["--training.eval=steps", "--training.early_stopping_patience=1", "--adalora.init_r=3"],
        ),
    ],
)
def test_other_tasks_and_ways_to_train_are_planned_and_measured(
    plan, tmp_path, monkeypatch, task, options
):
    measure_here(monkeypatch)
    if task == "causal_lm":
        language = save_language_model(tmp_path / "language")
        values = language_job(language, write_pairs(tmp_path / "pairs"), tmp_path / "run")
    else:
        folder = tmp_path / "images"
        for split in ("train", "validation"):
            write_rows(folder / f"{split}.parquet", picture_rows(12))
        values = job_values(save_vit(tmp_path / "vit"), folder, tmp_path / "run")
    config = write_job(tmp_path / "other.yaml", values | {"task": task})
    planned = plan("--measure", *options, config=config)
    assert planned["task"] == task
    assert {"dynamic", "lora", "full"} <= set(planned["methods"])
    for method in planned["methods"].values():
        assert 0 < method["trainable"] <= method["total"]
    assert planned["not_measured"] == {}
    assert list(planned["measured"]) == list(planned["methods"])
    for peak in planned["measured"].values():
        assert peak["peak_memory_bytes"] > 10**8


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lora.rank", 8], "unknown key `lora.rank`"),
        (["--model.path", "nowhere"], "nowhere, which has no config.json"),
        (["--data.label", "lable"], "'lable'"),
        (["--dynamic.min_rank", 3], "lower `min_rank`"),
    ],
)
def test_what_train_refuses_is_refused(refused, error, job, options, told):
    assert told in refused("plan", job, *options)
    assert told in error("--dry-run", *options)


def test_a_child_that_dies_is_told_and_the_others_are_measured(plan, children):
    children({method: code for method, (code, _) in DEATHS.items()})
    values = plan("--measure")
    peak = {"peak_memory_bytes": 3 * 2**30, "peak_gpu_memory_bytes": None}
    assert values["measured"] == {"dynamic": peak}
    assert list(values["not_measured"]) == list(DEATHS)
    for method, (_, told) in DEATHS.items():
        assert told in values["not_measured"][method]


def test_the_table_is_for_people_and_has_the_measured_peaks(job, children, capsys):
    children({"full": "os._exit(3)"}, gpu=5 * 2**20)
    assert main(["plan", str(job), "--measure"]) == 0
    text = capsys.readouterr().out
    assert missing(text, *METHODS, "48 training and 16 validation rows, 12 steps | 100.00%") == []
    (lora,) = [line for line in text.splitlines() if line.startswith("│ lora")]
    assert missing(lora, "3,072 MiB", "5 MiB") == []
    told = "full could not be measured: the process ended with exit code 3."
    assert told in text.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_measured_peak_is_within_15_percent_of_a_run(plan, output, job):
    measured = plan("--measure")["measured"]
    for method in METHODS:
        command = [sys.executable, "-m", "dynlora", "train", str(job), "--method", method]
        run_in_group([*command, "--overwrite=true"], check=True)
        real = facts(output)["peak_memory_bytes"]
        assert measured[method]["peak_memory_bytes"] == pytest.approx(real, rel=0.15)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(train, output, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert train("--dry-run", "--method", "dynamic") == 0
    assert snapshot(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data: 48 training and 16 validation rows, 2 outputs"
    trained = r"[\d,]+ LoRA parameters, 34 others"
    assert re.fullmatch(rf"method dynamic: {trained}; 12 steps", lines[1])
    assert lines[2].startswith("validation before training: accuracy 0.")
    assert lines[3].startswith(f"would train and write to {output}; nothing was written")
    assert len(lines) == 4


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_dry_run_tells_what_the_run_then_does_with_each_kind_of_file(
    said, job, output, finished, tmp_path, ending
):
    data = write_data(tmp_path / "same rows", ending=ending)
    told, run = said("train", job, "--data.path", data, "--dry-run"), facts(finished)
    assert (told["dry_run"], told["replaces_run"], told["output"]) == (True, False, str(output))
    for key in ("steps", "budget", "metrics_before"):
        assert told[key] == run[key]
    assert told["start_parameters"] == run["parameters"]["start"]
    assert {"train": told["train_rows"], "validation": told["validation_rows"]} == run["rows"]


def test_a_run_that_would_be_replaced_or_gone_on_with_is_told_and_left_alone(
    train, error, output, finished, capsys
):
    shutil.copytree(finished, output)
    before = snapshot(output)
    times = {path: path.stat().st_mtime_ns for path in (output, *output.rglob("*"))}
    for options, told in (
        (("--overwrite", "true"), ", replacing the run there;"),
        (("--training.resume", "latest"), ", going on from step 12;"),
    ):
        assert train("--dry-run", *options) == 0
        assert f"write to {output}{told}" in capsys.readouterr().out
    assert snapshot(output) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "`--overwrite true`" in error("--dry-run")
