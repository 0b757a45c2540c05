"""A run that was killed, stopped or had finished goes on where it was, to the last bit."""

import errno
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dynlora.cli.main import main
from dynlora.runs.checkpoints import finish_command, seal
from dynlora.runs.record import RunRecord
from dynlora.train.progress import ProgressBar
from tests.cli.conftest import snapshot
from tests.jobs import job_values, write_data, write_job, write_rows
from tests.processes import run_in_group

Train = Callable[..., int]
FinishedBy = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]


FIRST_IS_BEST = (
    "--method", "lora", "--training.save", "epoch", "--training.epochs", 3,
    "--training.learning_rate", 1e-9, "--training.load_best_model_at_end", True,
)  # fmt: skip
"""Options of a run of three checkpoints, which ends with the first of them."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run: Path, method: str) -> dict[str, torch.Tensor]:
    if method == "full":
        return load_file(run / "model" / "model.safetensors")
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses(run: Path) -> list[tuple[int, float]]:
    """Return each step's training loss, and the validation losses among them."""
    lines = read_lines(run / "metrics.jsonl")
    return [(x["step"], x[key]) for x in lines for key in ("loss", "eval_loss") if key in x]


def keys_of_lines(run: Path) -> list[tuple[int, list[str]]]:
    """Return the step and the keys of each line; the first evaluation of a process has one more."""
    lines = read_lines(run / "metrics.jsonl")
    return [(x["step"], sorted(k for k in x if "preparation_time" not in k)) for x in lines]


def facts(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "run.json").read_text())
    return values


def assert_same_end(one: Path, other: Path, method: str) -> None:
    first, second = weights(one, method), weights(other, method)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert losses(one) == losses(other)
    if method == "dynamic":
        assert (one / "ranks.jsonl").read_bytes() == (other / "ranks.jsonl").read_bytes()
        configs = [run / "adapter" / "adapter_config.json" for run in (one, other)]
        assert configs[0].read_bytes() == configs[1].read_bytes()
    runs = [facts(run) for run in (one, other)]
    for key in ("metrics_before", "metrics_after", "parameters", "final_ranks", "steps"):
        assert runs[0][key] == runs[1][key], key


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> None:
    """Let a run end with an error once a step is done."""

    def stop(self: ProgressBar, args: object, state: Any, *more: object, **named: object) -> None:
        if state.global_step == step:
            raise error

    monkeypatch.setattr(ProgressBar, "on_step_end", stop)


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(
    ("method", "step", "checkpoint"),
    [("dynamic", 5, 4), ("dynamic", 11, 10), ("lora", 7, 6), ("full", 11, 10)],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    train: Train,
    output: Path,
    finished_by: FinishedBy,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    step: int,
    checkpoint: int,
) -> None:
    options = ("--method", method, "--training.save_steps", 2)
    with monkeypatch.context() as patch:
        stop_at(patch, step, SystemExit)
        with pytest.raises(SystemExit):
            train(*options)
    assert train(*options, "--training.resume", "latest") == 0
    run = facts(output)
    assert run["resumed_from_step"] == checkpoint
    assert_same_end(finished_by(method), output, method)
    saved = output / "checkpoints" / f"checkpoint-{checkpoint}" / "job.json"
    if saved.exists():
        before = json.loads(saved.read_text())["seconds"]
        assert run["seconds"]["training_steps"] > before["training_steps"] > 0
        assert run["seconds"]["evaluation"] > before["evaluation"] > 0


@pytest.mark.usefixtures("moving")
def test_a_stopped_run_that_was_moved_goes_on_where_it_lies_by_the_command_it_is_told(
    train: Train, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, moved = tmp_path / "stopped", tmp_path / "moved"
    with monkeypatch.context() as patch:
        stop_at(patch, 7, SystemExit)  # between the two epochs
        with pytest.raises(SystemExit):
            train("--training.save_steps", 2, "--output", stopped)
    stopped.rename(moved)
    assert main(finish_command(moved, "dynamic").split()[1:]) == 0
    assert not stopped.exists()
    assert_same_end(finished, moved, "dynamic")


def test_a_checkpoint_on_an_epochs_last_step_knows_that_epochs_evaluation(
    train: Train, output: Path
) -> None:
    options = ("--training.save_steps", 6, "--training.save_total_limit", "null")
    assert train("--method", "lora", *options) == 0
    for step in (6, 12):
        state = json.loads(
            (output / f"checkpoints/checkpoint-{step}/trainer_state.json").read_text()
        )
        assert [line["step"] for line in state["log_history"] if "eval_loss" in line][-1] == step


def test_a_run_with_patience_that_resumes_between_epochs_stops_where_the_whole_one_does(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = [
        "--method", "lora", "--training.save_steps", 6, "--training.epochs", 6,
        "--training.learning_rate", 1e-9, "--training.early_stopping_patience", 2,
    ]  # fmt: skip
    assert train(*options, "--output", whole) == 0
    assert losses(whole)[-1][0] == 18  # nothing is learned: the first evaluation stays the best
    with monkeypatch.context() as patch:
        stop_at(patch, 13, SystemExit)
        with pytest.raises(SystemExit):
            train(*options, "--output", stopped)
    assert train(*options, "--output", stopped, "--training.resume", "latest") == 0
    assert_same_end(whole, stopped, "lora")


def test_the_newest_checkpoints_are_kept_and_the_best_only_where_the_run_ends_with_it(
    train: Train, tmp_path: Path
) -> None:
    options = [
        "--method", "lora", "--training.save", "epoch", "--training.epochs", 3,
        "--training.learning_rate", 1e-9, "--training.save_total_limit", 1,
    ]  # fmt: skip
    for best, kept in ((False, {"checkpoint-18"}), (True, {"checkpoint-6", "checkpoint-18"})):
        output = tmp_path / str(best)
        assert train(*options, "--training.load_best_model_at_end", best, "--output", output) == 0
        assert {path.name for path in (output / "checkpoints").iterdir()} == kept


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Path:
    """Return a run that ended with its first checkpoint, written to a relative path."""
    folder = tmp_path_factory.mktemp("best")
    job = write_job(folder / "job.yaml", job_values(model, data, Path("run")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", str(job), *map(str, FIRST_IS_BEST), "--quiet"]) == 0
    assert json.loads((folder / "run/run.json").read_text())["best_checkpoint"] == str(
        folder / "run/checkpoints/checkpoint-6"
    )
    return folder / "run"


def test_a_finished_run_that_was_moved_still_ends_with_its_best_checkpoint(
    train: Train, output: Path, best: Path
) -> None:
    shutil.copytree(best, output)
    assert train(*FIRST_IS_BEST, "--training.resume", "latest") == 0
    run = facts(output)
    assert run["best_checkpoint"] == str(output / "checkpoints" / "checkpoint-6")
    assert_same_end(best, output, "lora")


def test_a_run_that_goes_on_in_another_folder_still_ends_with_its_best_checkpoint(
    train: Train, output: Path, best: Path, tmp_path: Path, capsys: Capture
) -> None:
    lost = shutil.copytree(best, tmp_path / "lost") / "checkpoints"
    shutil.rmtree(lost / "checkpoint-6")
    assert train(*FIRST_IS_BEST, "--training.resume", lost / "checkpoint-18") == 2
    assert "got no" in capsys.readouterr().err
    resume = ("--training.resume", best / "checkpoints" / "checkpoint-18")
    assert train(*FIRST_IS_BEST, *resume) == 0
    run = facts(output)
    assert run["best_checkpoint"] == str(best / "checkpoints" / "checkpoint-6")
    assert_same_end(best, output, "lora")


# In a process of its own: a run that ends itself, at one of the places where a run can be.

MOMENTS = ("before the step", "in an event", "after the step", "in a checkpoint")
SCRIPT = """
import os, signal, sys
from pathlib import Path
from dynlora.fused import layers as fused
from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.cli.main import main
from dynlora.importance.agreement import AgreementTest
from dynlora.integrations import trainer
from dynlora.train.progress import ProgressBar
from dynlora.train.stopping import Stopping

job, output, moment, step, name = sys.argv[1:]
number, now = getattr(signal, name), 0

def maybe(at):
    if at == moment and now == int(step):
        os.kill(os.getpid(), number)

def before(self, args, state, control, **more):
    global now
    now = state.global_step + 1
    maybe("before the step")

def after(self, *more, **named):
    maybe("after the step")

change, save = LoraAdapters._change, trainer.save_state

def in_event(self, *more):
    maybe("in an event")
    return change(self, *more)

def in_checkpoint(folder, state):
    if now >= int(step) and moment == "in a checkpoint":
        os.kill(os.getpid(), number)
    save(folder, state)

Stopping.on_step_begin = before
ProgressBar.on_step_end = after
LoraAdapters._change = in_event
trainer.save_state = in_checkpoint
AgreementTest.is_significant = lambda self: True
fused.LEAST_ELEMENTS = 0  # as in the tests' process
sys.exit(main(["train", job, "--output", output]))
"""


def run_that_ends_itself(
    job: Path, output: Path, moment: str, step: int, name: str
) -> subprocess.CompletedProcess[str]:
    """Train in a process that sends itself a signal at a moment of a step."""
    arguments = [str(job), str(output), moment, str(step), name]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return run_in_group(command, capture_output=True, text=True)


def kill_and_resume(train: Train, job: Path, killed: Path, whole: Path, seed: int) -> None:
    """Kill a run somewhere, go on from what is good, and compare with the whole run."""
    draw = random.Random(seed)
    moment = MOMENTS[seed % len(MOMENTS)]
    step = draw.choice(EVENTS) if moment == "in an event" else draw.randint(6, 12)
    done = run_that_ends_itself(job, killed, moment, min(step, 10), "SIGKILL")
    assert done.returncode == -signal.SIGKILL, (moment, step, done.stderr[-2000:])
    assert facts(killed)["status"] == "running"
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line that the kill cut short
    saved = any((killed / "checkpoints").glob("checkpoint-*/job.json"))
    options = ("--training.resume", "latest-good") if saved else ("--overwrite", "true")
    assert train("--output", killed, *options) == 0
    assert facts(killed)["status"] == "finished"
    assert_same_end(whole, killed, "dynamic")


EVENTS = (3, 6, 9)
"""Of the job's 12 steps; checkpoints are at 5 and 10."""


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_killed_outright_resumes_to_the_same_bits(
    train: Train, output: Path, job: Path, finished: Path, seed: int
) -> None:
    kill_and_resume(train, job, output, finished, seed)


@pytest.mark.slow
@pytest.mark.usefixtures("moving")
def test_runs_killed_at_thirty_moments_resume_to_the_same_bits(
    train: Train, tmp_path: Path, job: Path, finished: Path
) -> None:
    for seed in range(10, 40):
        kill_and_resume(train, job, tmp_path / f"killed-{seed}", finished, seed)


@pytest.mark.usefixtures("moving")
def test_a_run_that_keeps_one_checkpoint_has_a_whole_one_while_it_writes_the_next(
    train: Train, output: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--training.save_total_limit", 1)

    def stop(folder: Path, **_: object) -> None:
        if folder.name == "checkpoint-10":
            raise SystemExit
        seal(folder, **_)

    with monkeypatch.context() as patch:
        patch.setattr("dynlora.train.recorder.seal", stop)
        with pytest.raises(SystemExit):
            train(*options)
    assert train(*options, "--training.resume", "latest-good") == 0
    assert facts(output)["resumed_from_step"] == 5
    assert_same_end(finished, output, "dynamic")


FULL_DISK = """
import resource, sys
from dynlora.fused import layers as fused
from dynlora.cli.main import main
from dynlora.importance.agreement import AgreementTest
from dynlora.train.progress import ProgressBar

job, output, limit = sys.argv[1:]

def full_from_step_8(self, args, state, *more, **named):
    if state.global_step == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))

AgreementTest.is_significant = lambda self: True
fused.LEAST_ELEMENTS = 0  # as in the tests' process
ProgressBar.on_step_end = full_from_step_8
sys.exit(main(["train", job, "--output", output]))
"""


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (1_000, r"error: a path must be accessible, but got .*/full/.*File too large"),
        (30_000, r"error: a checkpoint must be written whole, but in .*checkpoint-10 the disk"),
    ],
)
def test_a_full_disk_is_told_in_a_line_and_leaves_what_was_saved_before(
    train: Train, tmp_path: Path, job: Path, finished: Path, limit: int, told: str
) -> None:
    full = tmp_path / "full"
    command = [sys.executable, "-W", "ignore", "-c", FULL_DISK, str(job), str(full), str(limit)]
    done = run_in_group(command, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert re.match(told, errors[0])
    assert train("--output", full, "--training.resume", "latest-good") == 0
    assert_same_end(finished, full, "dynamic")


@pytest.mark.usefixtures("moving")
def test_sigterm_finishes_the_step_and_leaves_a_checkpoint_to_go_on_from(
    train: Train, output: Path, job: Path, finished: Path
) -> None:
    done = run_that_ends_itself(job, output, "before the step", 8, "SIGTERM")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    assert "after 8 of 12 steps; go on from step 8: dynlora train" in done.stderr
    assert facts(output)["status"] == "interrupted"
    assert train("--training.resume", "latest") == 0
    assert facts(output)["resumed_from_step"] == 8
    assert_same_end(finished, output, "dynamic")


@pytest.mark.usefixtures("moving")
def test_a_run_resumes_into_another_folder_and_leaves_the_first_as_it_was(
    train: Train, output: Path, finished: Path, capsys: Capture
) -> None:
    before = snapshot(finished)
    assert train("--method", "lora", "--training.epochs", 1) == 0
    assert (output / "checkpoints" / "checkpoint-6").exists()
    resume = ("--training.resume", finished / "checkpoints" / "checkpoint-10")
    assert train(*resume) == 2
    assert "which holds one" in capsys.readouterr().err
    assert train(*resume, "--overwrite", "true") == 0
    assert not (output / "checkpoints" / "checkpoint-6").exists(), "the other run is cleared"
    assert_same_end(finished, output, "dynamic")
    assert snapshot(finished) == before


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(
    "end",
    [
        ("--training.max_steps", 4, "--training.schedule", "constant"),  # inside an epoch
        ("--training.epochs", 1.5, "--training.schedule", "constant"),
        ("--training.load_best_model_at_end", True, "--training.save", "epoch"),
    ],
    ids=["steps", "half an epoch", "the best"],
)
def test_a_finished_run_can_be_resumed_and_stays_as_it_is(
    train: Train, output: Path, end: tuple[Any, ...]
) -> None:
    assert train(*end) == 0
    adapter = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    ranks = (output / "ranks.jsonl").read_bytes()
    logged = keys_of_lines(output)
    before = facts(output)
    assert train(*end, "--training.resume", "latest") == 0
    assert keys_of_lines(output) == logged
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert (output / "ranks.jsonl").read_bytes() == ranks
    after = facts(output)
    assert after["steps"] == before["steps"]
    assert after["metrics_after"] == before["metrics_after"]
    assert after["seconds"]["training_steps"] == before["seconds"]["training_steps"]


def test_rows_that_have_changed_are_refused_though_they_are_as_many(
    train: Train, tmp_path: Path, capsys: Capture
) -> None:
    data = write_data(tmp_path / "rows")
    options = ("--method", "lora", "--data.path", data, "--training.resume")
    assert train(*options, "none") == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-12")
    rows = read_lines(data / "train.jsonl")
    write_rows(data / "train.jsonl", [rows[0] | {"text": "green"}, *rows[1:]])
    assert train(*options, "latest") == 2
    assert "must have the model and data of its checkpoint" in capsys.readouterr().err
    write_rows(data / "train.jsonl", rows)
    assert train(*options, "latest") == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_how_a_run_ended_is_told_though_the_disk_takes_no_more(
    train: Train,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    error: type[BaseException],
) -> None:
    update = RunRecord.update

    def refused(self: RunRecord, **values: object) -> None:
        if values.get("status") in ("failed", "interrupted"):
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        update(self, **values)

    monkeypatch.setattr(RunRecord, "update", refused)
    stop_at(monkeypatch, 7, error)
    if error is KeyboardInterrupt:
        assert train() == 130
        assert "go on from step 5: dynlora train" in capsys.readouterr().err
    else:
        with pytest.raises(error):
            train()


@pytest.mark.usefixtures("moving")
def test_ctrl_c_is_recorded_and_tells_how_to_go_on(
    train: Train, output: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 7, KeyboardInterrupt)
        assert train() == 130
    run = facts(output)
    assert (run["status"], run["steps"]) == ("interrupted", 7)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    line = captured.err.splitlines()[-1]
    assert line.startswith("interrupted: after 7 of 12 steps; go on from step 5: dynlora train ")
    command = line.partition("go on from step 5: ")[2]
    assert main(command.split()[1:]) == 0, "the command can be typed as it is"
    assert_same_end(finished, output, "dynamic")


def test_ctrl_c_before_the_first_checkpoint_tells_how_to_start_again(
    train: Train, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2, KeyboardInterrupt)
        assert train() == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("interrupted: after 2 of 12 steps, before the first checkpoint;")
    assert main(line.partition("start again: ")[2].split()[1:]) == 0
    assert facts(output)["status"] == "finished"


def test_ctrl_c_while_loading_writes_nothing(
    train: Train, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynlora.train.build.load_data", stop)
    assert train() == 130
    assert capsys.readouterr().err == "interrupted: before anything was written\n"
    assert not output.exists()
