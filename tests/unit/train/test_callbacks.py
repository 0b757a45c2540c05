"""Callbacks of training: progress, the run's files, and when training stops."""

import io
import os
import signal
import time
from unittest.mock import Mock

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from dynlora import DynamicLora, DynamicLoraCallback
from dynlora.runs.folder import RunFolder
from dynlora.train.callbacks import ProgressBar, Recorder, Stopping
from tests.unit.events import make_event

CONTROL = TrainerControl()


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("args")))


def printed(args, steps, *, terminal):
    """Return what a run prints that logs a loss after each step and evaluates at its end."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    bar = ProgressBar(console, ("accuracy", "loss"), None)
    state = TrainerState(max_steps=steps)
    bar.on_train_begin(args, state, CONTROL)
    for step in range(1, steps + 1):
        state.global_step = step
        bar.on_step_end(args, state, CONTROL)
        bar.on_log(args, state, CONTROL, logs={"loss": 1 / step})
    metrics = {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0}
    bar.on_log(args, state, CONTROL, logs=metrics)
    bar.on_train_end(args, state, CONTROL)
    return console.file.getvalue()


def test_a_pipe_gets_about_ten_lines_of_loss_and_each_evaluation(args):
    lines = printed(args, 1000, terminal=False).splitlines()
    assert len(lines) == 11
    assert lines[0] == "step 100/1000: training loss 0.0100"
    assert lines[-1] == "step 1000/1000: validation accuracy 0.7500, loss 0.5000"


def test_a_terminal_gets_a_bar_with_the_newest_loss(args):
    text = printed(args, 20, terminal=True)
    assert "20/20" in text
    assert "loss 0.050" in text
    assert "step 20/20: validation accuracy 0.7500, loss 0.5000" in text
    assert "training loss" not in text


def test_the_bar_shows_the_ranks_after_each_event(args):
    ranks = {"a": 4, "b": 4}
    before = make_event(1, ranks, ranks)  # of the run that is resumed
    dynamic = Mock(spec=DynamicLora, ranks=ranks, history=[before])
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bar = ProgressBar(console, (), Mock(spec=DynamicLoraCallback, dynamic=dynamic))
    state = TrainerState(max_steps=9)
    bar.on_train_begin(args, state, CONTROL)
    for state.global_step in range(2, 5):
        if state.global_step == 3:
            dynamic.ranks = {"a": 6, "b": 2}
            dynamic.history.append(make_event(3, ranks, dynamic.ranks))
        bar.on_step_end(args, state, CONTROL)
    bar.on_train_end(args, state, CONTROL)
    text = console.file.getvalue()
    assert "r 2 to 6, median 4, agreement 3.0" in text


def test_training_seconds_exclude_the_time_between_steps(tmp_path, args):
    recorder = Recorder(RunFolder(tmp_path), None, limit=None)
    for _ in range(2):
        recorder.on_step_begin(args, TrainerState(), CONTROL)
        time.sleep(0.02)
        recorder.on_step_end(args, TrainerState(), CONTROL)
        time.sleep(0.1)
    assert 0.04 <= recorder.train_seconds < 0.1


def test_a_checkpoint_is_sealed_and_the_oldest_beyond_the_limit_are_deleted(tmp_path, args):
    folder = RunFolder(tmp_path)
    others = {"checkpoint-2-keep", "checkpoint-best", "notes"}
    for name in ("checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-20", *others):
        (folder.checkpoints / name).mkdir(parents=True)
    recorder = Recorder(folder, None, limit=2)
    recorder.on_save(args, TrainerState(global_step=20), CONTROL)
    kept = {path.name for path in folder.checkpoints.iterdir()}
    assert kept == {"checkpoint-10", "checkpoint-20", *others}
    assert (folder.checkpoints / "checkpoint-20" / "job.json").is_file()


@pytest.fixture
def usual_interrupt():
    """Let SIGINT interrupt, as in a terminal: in the background a process begins without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_interrupt")
def test_the_first_signal_is_noted_with_a_word_and_a_later_one_interrupts(capsys, monkeypatch):
    signals = Stopping("loss", None)
    with signals.listening():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        assert capsys.readouterr().err.count("stopping after this step") == 1, "sent at once"
        monkeypatch.setattr("dynlora.train.callbacks.SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Stopping("loss", None).listening():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("usual_interrupt")
def test_somebody_elses_handler_stays():
    seen = []

    def theirs(number, _):
        seen.append(number)

    before = signal.signal(signal.SIGTERM, theirs)
    try:
        with Stopping("loss", None).listening():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) is theirs
        assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def log(metric, *values):
    """Return a log with training lines between the evaluations, and one before the first step."""
    lines = [{"step": 0, f"eval_{metric}": 0.0 if metric == "loss" else 1.0}]
    for step, value in enumerate(values, start=1):
        lines += [{"step": step, "loss": 1.0}, {"step": step, f"eval_{metric}": value}]
    return lines


@pytest.mark.parametrize(
    ("values", "over"),
    [
        ((), False),
        ((0.5, 0.4), False),
        ((0.5, 0.4, 0.45), True),
        ((0.5, 0.4, 0.6, 0.5), False),
        ((0.5, 0.5, 0.5), True),  # equal is not better
    ],
)
def test_training_is_over_after_two_evaluations_without_improvement(values, over):
    assert Stopping("accuracy", 2).is_over(log("accuracy", *values)) is over
    lower = tuple(1 - value for value in values)
    assert Stopping("loss", 2).is_over(log("loss", *lower)) is over
    assert not Stopping("accuracy", 1).is_over(log("f1", *values))
    assert not Stopping("accuracy", None).is_over(log("accuracy", *values))
