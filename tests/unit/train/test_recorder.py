"""The recorder writes a run's files during training."""

import json
import math
import time
from importlib.metadata import version

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from dynlora.runs.folder import RunFolder
from dynlora.train.recorder import Recorder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("args")))


def at(step):
    return TrainerState(global_step=step)


def lines(path):
    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_log_entries_are_written_once_the_folder_is_open(folder, args):
    recorder = Recorder(folder, None, limit=None)
    recorder.on_log(args, at(0), TrainerControl(), logs={"eval_loss": 1.0, "eval_runtime": 0.5})
    assert not folder.metrics.exists()
    recorder.open(None)
    recorder.on_log(args, at(5), TrainerControl(), logs={"loss": math.inf, "eval_runtime": 0.25})
    assert lines(folder.metrics) == [
        {"step": 0, "eval_loss": 1.0, "eval_runtime": 0.5},
        {"step": 5, "loss": None, "eval_runtime": 0.25},
    ]
    assert recorder.eval_seconds == 0.75


def test_training_seconds_exclude_the_time_between_steps(folder, args):
    recorder = Recorder(folder, None, limit=None)
    for _ in range(2):
        recorder.on_step_begin(args, at(0), TrainerControl())
        time.sleep(0.02)
        recorder.on_step_end(args, at(0), TrainerControl())
        time.sleep(0.1)
    assert 0.04 <= recorder.train_seconds < 0.1


def test_a_checkpoint_is_sealed_and_the_oldest_beyond_the_limit_are_deleted(folder, args):
    others = {"checkpoint-2-keep", "checkpoint-best", "notes"}
    for name in ("checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-20", *others):
        (folder.checkpoints / name).mkdir(parents=True)
    recorder = Recorder(folder, None, limit=2)
    recorder.train_seconds, recorder.eval_seconds = 7.5, 1.25
    recorder.on_save(args, at(20), TrainerControl())
    kept = {path.name for path in folder.checkpoints.iterdir()}
    assert kept == {"checkpoint-10", "checkpoint-20", *others}
    assert json.loads((folder.checkpoints / "checkpoint-20" / "job.json").read_text()) == {
        "format": 1, "dynlora": version("dynlora"), "step": 20,
        "seconds": {"training_steps": 7.5, "evaluation": 1.25}, "files": {},
    }  # fmt: skip
