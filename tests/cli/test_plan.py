"""`dynlora plan`: exact parameters per method, measured peaks, nothing written, clear errors."""

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

from dynlora.cli.main import main
from dynlora.train.job import train_briefly
from tests.cli.conftest import snapshot
from tests.jobs import job_values, write_job, write_rows
from tests.language import language_job, save_language_model, write_pairs
from tests.pictures import picture_rows, save_vit
from tests.processes import run_in_group

Plan = Callable[..., dict[str, Any]]
METHODS = ["dynamic", "lora", "adalora", "full"]
CHILD = """
import json, os, pickle, sys
config = pickle.load(sys.stdin.buffer)
print("a library says something")
if config.method == "full":
    {death}
print(json.dumps({{"peak_memory_bytes": 3 * 2**30, "peak_gpu_memory_bytes": {gpu}}}))
"""
"""Child that dies with `method: full` and reports 3 GiB with other methods."""


@pytest.fixture
def plan(job: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Return a runner of `dynlora plan --json`; it returns what was printed."""

    def run(*options: object, config: Path = job) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["plan", str(config), *map(str, options), "--json"]) == 0
        values: dict[str, Any] = json.loads(capsys.readouterr().out)
        return values

    return run


@pytest.fixture
def refused(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a runner of a plan that must fail; it returns the line after `error: `."""

    def run(*options: object) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main(["plan", str(job), *map(str, options)]) == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert captured.err.splitlines()[-1] == errors[0]
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert snapshot(tmp_path) == before
        return errors[0].removeprefix("error: ")

    return run


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces the child processes of `--measure` by `CHILD`."""

    def replace(death: str, gpu: int | None = None) -> None:
        command = (sys.executable, "-c", CHILD.format(death=death, gpu=gpu))
        monkeypatch.setattr("dynlora.train.plan.COMMAND", command)

    return replace


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do here what the child processes of `--measure` do, which saves the start of four."""

    def run(command: Any, **given: Any) -> subprocess.CompletedProcess[bytes]:
        peak = json.dumps(train_briefly(pickle.loads(given["input"])))
        return subprocess.CompletedProcess(command, 0, peak.encode(), b"")

    monkeypatch.setattr("dynlora.train.plan.subprocess", SimpleNamespace(run=run))


def test_parameters_per_method_are_exact(plan: Plan, model: Path) -> None:
    methods = plan()["methods"]
    assert list(methods) == METHODS

    base = BertForSequenceClassification.from_pretrained(model)
    everything = sum(parameter.numel() for parameter in base.parameters())
    sizes = {"full": (everything, everything)}
    stock = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    trained = sum(p.numel() for p in stock.parameters() if p.requires_grad)
    sizes["lora"] = sizes["dynamic"] = (trained, sum(p.numel() for p in stock.parameters()))
    for method, (trainable, total) in sizes.items():
        assert (methods[method]["trainable"], methods[method]["total"]) == (trainable, total)


def test_the_plan_agrees_with_the_run_and_writes_nothing(
    plan: Plan, tmp_path: Path, finished: Path
) -> None:
    before = snapshot(tmp_path)
    planned, run = plan(), json.loads((finished / "run.json").read_text())
    assert snapshot(tmp_path) == before
    assert planned["rows"] == run["rows"]
    assert planned["steps"] == run["steps"] == 12
    assert planned["num_labels"] == run["num_labels"]
    assert planned["methods"]["dynamic"]["budget"] == run["budget"]
    assert planned["methods"]["dynamic"]["start"] == run["parameters"]["start"]
    assert plan("--output", finished) == planned, "a run in `output` is no hindrance"


def test_the_configured_method_comes_first_and_others_say_why_not(plan: Plan) -> None:
    values = plan("--method", "lora", "--dynamic.min_rank", 3)
    assert list(values["methods"]) == ["lora", "adalora", "full"]
    assert list(values["impossible"]) == ["dynamic"]
    assert "lower `min_rank`" in values["impossible"]["dynamic"]


def test_the_table_is_for_people(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job)]) == 0
    text = capsys.readouterr().out
    for part in ("48 training and 16 validation rows, 12 steps", *METHODS, "100.00%", "--measure"):
        assert part in text


@pytest.mark.parametrize(
    "options",
    [
        ["--training.gradient_accumulation=3", "--training.bf16=true"],
        ["--training.eval=steps", "--training.early_stopping_patience=1", "--adalora.init_r=3"],
    ],
)
@pytest.mark.usefixtures("in_this_process")
def test_any_way_to_train_is_measured(plan: Plan, tmp_path: Path, options: list[str]) -> None:
    before = snapshot(tmp_path)
    values = plan("--measure", *options)
    assert snapshot(tmp_path) == before
    assert values["not_measured"] == {}
    assert list(values["measured"]) == METHODS
    for peak in values["measured"].values():
        assert peak["peak_memory_bytes"] > 10**8


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("task", ["image_classification", "causal_lm"])
def test_other_tasks_are_planned_and_measured(plan: Plan, tmp_path: Path, task: str) -> None:
    if task == "causal_lm":
        language = save_language_model(tmp_path / "language")
        values = language_job(language, write_pairs(tmp_path / "pairs"), tmp_path / "run")
    else:
        folder = tmp_path / "images"
        for split in ("train", "validation"):
            write_rows(folder / f"{split}.parquet", picture_rows(12))
        values = job_values(save_vit(tmp_path / "vit"), folder, tmp_path / "run")
    planned = plan("--measure", config=write_job(tmp_path / "other.yaml", values | {"task": task}))
    assert planned["task"] == task
    assert {"dynamic", "lora", "full"} <= set(planned["methods"])
    for method in planned["methods"].values():
        assert 0 < method["trainable"] <= method["total"]
    assert planned["not_measured"] == {}
    assert list(planned["measured"]) == list(planned["methods"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lora.rank", 8], "unknown key `lora.rank`"),
        (["--model.path", "nowhere"], "nowhere, which has no config.json"),
        (["--dynamic.min_rank", 3], "lower `min_rank`"),
        (["extra"], "unexpected extra argument (extra)"),
    ],
)
def test_what_train_refuses_is_refused(
    refused: Callable[..., str], options: list[object], told: str
) -> None:
    assert told in refused(*options)


def test_a_configuration_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "Missing argument 'CONFIG'" in capsys.readouterr().err
    assert main(["plan", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: dynlora plan [OPTIONS] CONFIG")


@pytest.mark.parametrize(
    ("death", "told"),
    [
        ("os.kill(os.getpid(), 9)", "the process was killed: most likely memory ran out"),
        (f"os.kill(os.getpid(), {int(signal.SIGALRM)})", "stopped after 3600 seconds"),
        ("raise MemoryError('no room for 9 bytes')", "MemoryError: no room for 9 bytes"),
        ("os._exit(3)", "the process ended with exit code 3"),
    ],
)
def test_a_child_that_dies_is_told_and_the_others_are_measured(
    plan: Plan, children: Callable[..., None], tmp_path: Path, death: str, told: str
) -> None:
    children(death)
    before = snapshot(tmp_path)
    values = plan("--measure")
    assert snapshot(tmp_path) == before
    peak = {"peak_memory_bytes": 3 * 2**30, "peak_gpu_memory_bytes": None}
    assert values["measured"] == dict.fromkeys(METHODS[:3], peak)
    assert list(values["not_measured"]) == ["full"]
    assert told in values["not_measured"]["full"]


def test_measured_peaks_stand_in_the_table(
    job: Path, children: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    children("os._exit(3)", gpu=5 * 2**20)
    assert main(["plan", str(job), "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (lora,) = [line for line in lines if line.startswith("│ lora")]
    assert "3,072 MiB" in lora
    assert "5 MiB" in lora
    assert "full could not be measured: the process ended with exit code 3." in lines


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_measured_peak_is_within_15_percent_of_a_run(plan: Plan, output: Path, job: Path) -> None:
    measured = plan("--measure")["measured"]
    assert not output.exists()
    for method in METHODS:
        command = [sys.executable, "-m", "dynlora", "train", str(job), "--method", method]
        run_in_group([*command, "--overwrite=true"], check=True)
        real = json.loads((output / "run.json").read_text())["peak_memory_bytes"]
        assert measured[method]["peak_memory_bytes"] == pytest.approx(real, rel=0.15)
