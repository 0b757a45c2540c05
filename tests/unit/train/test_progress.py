"""Progress while a job trains."""

import io

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from dynlora.train.progress import ProgressBar


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path))


def run(args, steps, *, terminal):
    """Return what a run prints that logs a loss after each step and evaluates at its end."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    bar = ProgressBar(console, ("accuracy", "loss"))
    state = TrainerState(max_steps=steps)
    bar.on_train_begin(args, state, TrainerControl())
    for step in range(1, steps + 1):
        state.global_step = step
        bar.on_step_end(args, state, TrainerControl())
        bar.on_log(args, state, TrainerControl(), logs={"loss": 1 / step})
    metrics = {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0}
    bar.on_log(args, state, TrainerControl(), logs=metrics)
    bar.on_train_end(args, state, TrainerControl())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_about_ten_lines_of_loss_and_each_evaluation(args):
    lines = run(args, 1000, terminal=False).splitlines()
    assert len(lines) == 11
    assert lines[0] == "step 100/1000: training loss 0.0100"
    assert lines[-1] == "step 1000/1000: validation accuracy 0.7500, loss 0.5000"


def test_a_terminal_gets_a_bar_with_the_newest_loss(args):
    text = run(args, 20, terminal=True)
    assert "20/20" in text
    assert "loss 0.050" in text
    assert "step 20/20: validation accuracy 0.7500, loss 0.5000" in text
    assert "training loss" not in text


def test_an_evaluation_before_training_is_step_0(args):
    console = Console(file=io.StringIO(), width=80)
    bar = ProgressBar(console, ("accuracy", "loss"))
    bar.on_log(args, TrainerState(), TrainerControl(), logs={"eval_loss": 0.25})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "step 0: validation loss 0.2500\n"
