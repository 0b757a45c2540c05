"""A run that was killed, stopped or had finished goes on where it was, to the last bit."""

import errno
import os
import random
import re
import resource
import shutil
import signal

import pytest

from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.cli.main import main
from dynlora.fused import layers as fused
from dynlora.importance.agreement import AgreementTest
from dynlora.integrations import trainer
from dynlora.runs.checkpoints import finish_command, seal
from dynlora.runs.record import RunRecord
from dynlora.train.callbacks import ProgressBar, Stopping
from tests.cli.finished import assert_same_end, facts, read_json, read_lines, stopped_at
from tests.jobs import job_values, snapshot, write_data, write_job, write_rows
from tests.processes import run_in_fork

NOTHING_IS_LEARNED = (
    "--method", "lora", "--training.save", "epoch", "--training.learning_rate", 1e-9,
)  # fmt: skip
FIRST_IS_BEST = (
    *NOTHING_IS_LEARNED, "--training.epochs", 3, "--training.load_best_model_at_end", True,
    "--training.save_total_limit", 1,
)  # fmt: skip
"""Options of a run of three checkpoints, which ends with the first of them."""


def checkpoints(run):
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(("method", "step", "saved"), [("dynamic", 5, 4), ("full", 11, 10)])
def test_a_stopped_run_resumes_to_the_same_bits(train, output, finished_by, method, step, saved):
    options = ("--method", method, "--training.save_steps", 2)
    with stopped_at(step), pytest.raises(SystemExit):
        train(*options)
    before = read_json(output / "checkpoints" / f"checkpoint-{saved}" / "job.json")["seconds"]
    assert train(*options, "--training.resume", "latest") == 0
    assert facts(output)["resumed_from_step"] == saved
    assert_same_end(finished_by(method), output)
    for part in ("training_steps", "evaluation"):
        assert facts(output)["seconds"][part] > before[part] > 0


def test_a_stopped_run_that_was_moved_goes_on_where_it_lies_by_the_command_it_is_told(
    train, tmp_path, finished_by
):
    stopped, moved = tmp_path / "stopped", tmp_path / "moved"
    with stopped_at(7), pytest.raises(SystemExit):  # between the two epochs
        train("--method", "lora", "--training.save_steps", 2, "--output", stopped)
    stopped.rename(moved)
    assert main(finish_command(moved, "lora").split()[1:]) == 0
    assert not stopped.exists()
    assert_same_end(finished_by("lora"), moved)


def test_early_stopping_ends_a_run_at_the_same_step_when_it_resumes(train, output, tmp_path):
    options = (
        *NOTHING_IS_LEARNED, "--training.epochs", 8, "--training.early_stopping_patience", 2,
        "--training.best_metric", "loss", "--training.load_best_model_at_end", True,
        "--training.save_total_limit", "null",
    )  # fmt: skip
    assert train(*options) == 0
    run = facts(output)
    assert run["status"] == "finished"
    assert run["steps"] == int(run["best_checkpoint"].rpartition("-")[2]) + 2 * 6 < 8 * 6
    for saved in (output / "checkpoints").iterdir():  # each knows its epoch's evaluation
        history = read_json(saved / "trainer_state.json")["log_history"]
        evaluated = [line["step"] for line in history if "eval_loss" in line]
        assert saved.name == f"checkpoint-{evaluated[-1]}"
    whole = shutil.copytree(output, tmp_path / "whole")
    for behind in (0, 6):
        for saved in (output / "checkpoints").iterdir():
            if int(saved.name.rpartition("-")[2]) > run["steps"] - behind:
                shutil.rmtree(saved)
        assert train(*options, "--training.resume", "latest") == 0
        assert_same_end(whole, output)


@pytest.fixture(scope="module")
def best(tmp_path_factory, model, data):
    """Return a run that ended with its first checkpoint, written to a relative path."""
    folder = tmp_path_factory.mktemp("best")
    job = write_job(folder / "job.yaml", job_values(model, data, "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", str(job), *map(str, FIRST_IS_BEST), "--quiet"]) == 0
    return folder / "run"


def test_a_finished_run_that_was_moved_says_so_and_still_ends_with_its_best_checkpoint(
    train, output, best, capsys
):
    assert checkpoints(best) == {"checkpoint-6", "checkpoint-18"}, "the best and the newest"
    assert facts(best)["best_checkpoint"] == str(best / "checkpoints/checkpoint-6")
    shutil.copytree(best, output)
    assert train(*FIRST_IS_BEST, "--training.resume", "latest") == 0
    assert "the run is finished at step 18: it is only" in capsys.readouterr().err
    assert facts(output)["best_checkpoint"] == str(output / "checkpoints" / "checkpoint-6")
    assert_same_end(best, output)


def test_a_run_that_goes_on_in_another_folder_still_ends_with_its_best_checkpoint(
    train, error, output, best, tmp_path
):
    lost = shutil.copytree(best, tmp_path / "lost") / "checkpoints"
    shutil.rmtree(lost / "checkpoint-6")
    assert "got no" in error(*FIRST_IS_BEST, "--training.resume", lost / "checkpoint-18")
    resume = ("--training.resume", best / "checkpoints" / "checkpoint-18")
    assert train(*FIRST_IS_BEST, *resume) == 0
    assert facts(output)["best_checkpoint"] == str(best / "checkpoints" / "checkpoint-6")
    assert_same_end(best, output)


# In a process of its own: a run that ends itself, at one of the places where a run can be.

MOMENTS = ("before the step", "in an event", "after the step", "in a checkpoint")
EVENTS = (3, 6, 9)
"""Of the job's 12 steps; checkpoints are at 5 and 10."""


def prepare():
    """Let ranks move and layers be fused, as in the tests' process."""
    AgreementTest.is_significant = lambda self: True
    fused.LEAST_ELEMENTS = 0


def train_and_end(job, output, moment, step, number):
    prepare()
    now = 0

    def maybe(at):
        if at == moment and (now == step or (now > step and moment == "in a checkpoint")):
            os.kill(os.getpid(), number)

    def before(self, args, state, control, **more):
        nonlocal now
        now = state.global_step + 1
        maybe("before the step")

    def first(at, function):
        def run(*given, **named):
            maybe(at)
            return function(*given, **named)

        return run

    Stopping.on_step_begin = before
    ProgressBar.on_step_end = first("after the step", lambda *_, **__: None)
    LoraAdapters._change = first("in an event", LoraAdapters._change)
    trainer.save_state = first("in a checkpoint", trainer.save_state)
    return main(["train", str(job), "--output", str(output)])


def kill_and_resume(train, job, killed, whole, seed):
    draw = random.Random(seed)
    moment = MOMENTS[seed % len(MOMENTS)]
    step = min(10, draw.choice(EVENTS) if moment == "in an event" else draw.randint(6, 12))
    done = run_in_fork(train_and_end, job, killed, moment, step, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, (moment, step, done.stderr[-2000:])
    assert facts(killed)["status"] == "running"
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line that the kill cut short
    saved = any((killed / "checkpoints").glob("checkpoint-*/job.json"))
    options = ("--training.resume", "latest-good") if saved else ("--overwrite", "true")
    assert train("--output", killed, *options) == 0
    assert facts(killed)["status"] == "finished"
    assert_same_end(whole, killed)


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_killed_outright_resumes_to_the_same_bits(train, output, job, finished, seed):
    kill_and_resume(train, job, output, finished, seed)


@pytest.mark.slow
@pytest.mark.usefixtures("moving")
def test_runs_killed_at_thirty_moments_resume_to_the_same_bits(train, tmp_path, job, finished):
    for seed in range(10, 40):
        kill_and_resume(train, job, tmp_path / f"killed-{seed}", finished, seed)


@pytest.mark.usefixtures("moving")
def test_a_run_that_keeps_one_checkpoint_has_a_whole_one_while_it_writes_the_next(
    train, output, finished, monkeypatch
):
    options = ("--training.save_total_limit", 1)

    def stop(folder, **_):
        if folder.name == "checkpoint-10":
            raise SystemExit
        seal(folder, **_)

    with monkeypatch.context() as patch:
        patch.setattr("dynlora.train.callbacks.seal", stop)
        with pytest.raises(SystemExit):
            train(*options)
    assert train(*options, "--training.resume", "latest-good") == 0
    assert facts(output)["resumed_from_step"] == 5
    assert_same_end(finished, output)
    assert checkpoints(output) == {"checkpoint-12"}


def train_until_the_disk_is_full(job, output, limit):
    """Train where no file can grow beyond a limit of bytes from step 8 on."""
    prepare()

    def full_from_step_8(self, args, state, *more, **named):
        if state.global_step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ProgressBar.on_step_end = full_from_step_8
    return main(["train", str(job), "--output", str(output)])


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (1_000, r"error: a path must be accessible, but got .*/full/.*File too large"),
        (30_000, r"error: a checkpoint must be written whole, but in .*checkpoint-10 the disk"),
    ],
)
def test_a_full_disk_is_told_in_a_line_and_leaves_what_was_saved_before(
    train, tmp_path, job, finished, limit, told
):
    full = tmp_path / "full"
    done = run_in_fork(train_until_the_disk_is_full, job, full, limit)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert re.match(told, errors[0])
    assert train("--output", full, "--training.resume", "latest-good") == 0
    assert_same_end(finished, full)


@pytest.mark.usefixtures("moving")
def test_sigterm_finishes_the_step_and_leaves_a_checkpoint_to_go_on_from(
    train, output, job, finished
):
    done = run_in_fork(train_and_end, job, output, "before the step", 8, signal.SIGTERM)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    assert "after 8 of 12 steps; go on with `dynlora train" in done.stderr
    assert facts(output)["status"] == "interrupted"
    assert train("--training.resume", "latest") == 0
    assert facts(output)["resumed_from_step"] == 8
    assert_same_end(finished, output)


@pytest.mark.usefixtures("moving")
def test_a_run_resumes_into_another_folder_and_leaves_the_first_as_it_was(
    train, error, output, finished, finished_by
):
    before = snapshot(finished)
    shutil.copytree(finished_by("lora"), output)
    (output / "checkpoints" / "checkpoint-10").rename(output / "checkpoints" / "checkpoint-6")
    resume = ("--training.resume", finished / "checkpoints" / "checkpoint-10")
    assert "which holds one" in error(*resume)
    assert train(*resume, "--overwrite", "true") == 0
    assert "checkpoint-6" not in checkpoints(output), "the other run is cleared"
    assert_same_end(finished, output)
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
def test_a_finished_run_can_be_resumed_and_stays_as_it_is(train, output, tmp_path, end):
    assert train(*end) == 0
    before = shutil.copytree(output, tmp_path / "before")
    assert train(*end, "--training.resume", "latest") == 0
    lines = [[x["step"] for x in read_lines(r / "metrics.jsonl")] for r in (before, output)]
    assert lines[0] == lines[1]
    assert_same_end(before, output)
    spent = [facts(run)["seconds"]["training_steps"] for run in (before, output)]
    assert spent[0] == spent[1]


def test_rows_that_have_changed_are_refused_though_they_are_as_many(train, error, output, tmp_path):
    data = write_data(tmp_path / "rows")
    options = ("--method", "lora", "--data.path", data, "--training.epochs", 1)
    assert train(*options) == 0
    shutil.rmtree(output / "checkpoints" / "checkpoint-6")
    rows = read_lines(data / "train.jsonl")
    write_rows(data / "train.jsonl", [rows[0] | {"text": "green"}, *rows[1:]])
    message = error(*options, "--training.resume", "latest")
    assert "must have the model, data, processes and engine of its checkpoint" in message
    write_rows(data / "train.jsonl", rows)
    assert train(*options, "--training.resume", "latest") == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_how_a_run_ended_is_told_though_the_disk_takes_no_more(train, monkeypatch, capsys, error):
    update = RunRecord.update

    def refused(self, **values):
        if values.get("status") in ("failed", "interrupted"):
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        update(self, **values)

    monkeypatch.setattr(RunRecord, "update", refused)
    with stopped_at(7, error):
        if error is KeyboardInterrupt:
            assert train("--method", "lora") == 130
            assert "go on with `dynlora train" in capsys.readouterr().err
        else:
            with pytest.raises(error):
                train("--method", "lora")


@pytest.mark.usefixtures("moving")
def test_ctrl_c_is_recorded_and_tells_how_to_go_on(train, output, finished, capsys):
    with stopped_at(7, KeyboardInterrupt):
        assert train() == 130
    assert (facts(output)["status"], facts(output)["steps"]) == ("interrupted", 7)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    line = captured.err.splitlines()[-1]
    assert line.startswith("interrupted: after 7 of 12 steps; go on with `dynlora train ")
    assert main(line.split("`")[1].split()[1:]) == 0, "the command can be typed as it is"
    assert_same_end(finished, output)


def test_ctrl_c_before_the_first_checkpoint_tells_how_to_start_again(train, output, capsys):
    with stopped_at(2, KeyboardInterrupt):
        assert train("--method", "lora") == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("interrupted: after 2 of 12 steps; start again with `dynlora train ")
    assert main(line.split("`")[1].split()[1:]) == 0
    assert facts(output)["status"] == "finished"


def test_ctrl_c_while_loading_writes_nothing(train, output, monkeypatch, capsys):
    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynlora.train.build.load_data", stop)
    assert train() == 130
    assert capsys.readouterr().err == "interrupted: before anything was written\n"
    assert not output.exists()
