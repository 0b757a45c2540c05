"""Callbacks that write what happens while it happens."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from dynlora import DynamicLoraCallback
from dynlora.files.json_files import write_lines
from dynlora.runs.folder import RunFolder
from dynlora.runs.resume import Past
from dynlora.train.recorder import CheckpointRecorder, MetricsRecorder, Stopwatch, started


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "checkpoints"))


def at(step: int) -> TrainerState:
    return TrainerState(global_step=step)


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def past(folder: Path, step: int) -> Past:
    return Past(
        checkpoint=folder, source=RunFolder(folder), step=step, train_seconds=0.0,
        eval_seconds=0.0, run={}, log=(),
    )  # fmt: skip


def test_what_is_logged_before_the_folder_opens_is_written_when_it_does(
    tmp_path: Path, args: TrainingArguments
) -> None:
    recorder = MetricsRecorder(tmp_path / "metrics.jsonl")
    recorder.on_log(args, at(0), TrainerControl(), {"eval_loss": 1.0, "eval_runtime": 0.5})
    assert not (tmp_path / "metrics.jsonl").exists()
    recorder.start(None)
    recorder.on_log(args, at(5), TrainerControl(), {"loss": 0.5})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval_loss": 1.0, "eval_runtime": 0.5}, {"step": 5, "loss": 0.5},
    ]  # fmt: skip


def test_a_new_run_drops_old_lines_and_a_resumed_one_keeps_those_up_to_its_checkpoint(
    tmp_path: Path, args: TrainingArguments
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": step} for step in (0, 4, 5, 6)])
    MetricsRecorder(path).start(past(tmp_path, 5))
    assert lines(path) == [{"step": step} for step in (0, 4, 5)]
    MetricsRecorder(path).start(None)
    assert lines(path) == []


def test_evaluation_time_adds_up(tmp_path: Path, args: TrainingArguments) -> None:
    recorder = MetricsRecorder(tmp_path / "metrics.jsonl")
    for seconds in (0.5, 0.25):
        recorder.on_log(args, at(1), TrainerControl(), {"eval_runtime": seconds})
    recorder.on_log(args, at(1), TrainerControl(), {"loss": 3.0})
    assert recorder.seconds == 0.75


def test_a_number_that_json_does_not_have_becomes_null(
    tmp_path: Path, args: TrainingArguments
) -> None:
    recorder = MetricsRecorder(tmp_path / "metrics.jsonl")
    recorder.start(None)
    values = {"grad_norm": math.nan, "loss": math.inf, "epoch": 1}
    recorder.on_log(args, at(1), TrainerControl(), values)
    assert lines(recorder.path) == [{"step": 1, "grad_norm": None, "loss": None, "epoch": 1}]


def test_the_stopwatch_adds_up_steps_and_not_what_lies_between(args: TrainingArguments) -> None:
    watch = Stopwatch()
    for _ in range(2):
        watch.on_step_begin(args, at(0), TrainerControl())
        time.sleep(0.02)
        watch.on_step_end(args, at(0), TrainerControl())
        time.sleep(0.1)
    assert 0.04 <= watch.seconds < 0.1


def test_a_checkpoint_is_completed_with_the_seconds_so_far(
    tmp_path: Path, args: TrainingArguments
) -> None:
    watch, metrics = Stopwatch(), MetricsRecorder(tmp_path / "metrics.jsonl")
    watch.seconds, metrics.seconds = 7.5, 1.25
    CheckpointRecorder(watch, metrics, limit=None).on_save(args, at(20), TrainerControl())
    path = tmp_path / "checkpoints" / "checkpoint-20" / "job.json"
    assert json.loads(path.read_text()) == {
        "step": 20, "seconds": {"training_steps": 7.5, "evaluation": 1.25}, "files": {},
    }  # fmt: skip


def test_the_controller_is_not_there_before_training() -> None:
    with pytest.raises(RuntimeError, match="from on_train_begin on"):
        started(DynamicLoraCallback())


def test_what_is_deleted_are_the_oldest_checkpoints_by_their_numbers_and_nothing_else(
    tmp_path: Path, args: TrainingArguments
) -> None:
    folder = tmp_path / "checkpoints"
    others = {"checkpoint-2-keep", "checkpoint-best", "notes"}
    for name in ("checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-20", *others):
        (folder / name).mkdir(parents=True)
    recorder = CheckpointRecorder(Stopwatch(), MetricsRecorder(tmp_path / "m"), limit=2)
    recorder.on_save(args, at(20), TrainerControl())
    assert {path.name for path in folder.iterdir()} == {"checkpoint-10", "checkpoint-20", *others}
