"""Which checkpoint a job goes on from, and the state of ranks in it."""

import json
import math
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from dynlora.errors import ResumeError, RunFileError
from dynlora.files.json_files import write_json
from dynlora.integrations.checkpoint import load_state, save_state
from dynlora.runs import resume
from dynlora.runs.checkpoints import complete_checkpoints, seal
from dynlora.runs.folder import RunFolder
from dynlora.runs.resume import Past, check_same_task
from dynlora.train.config import DataConfig, JobConfig, ModelConfig, TrainingConfig
from dynlora.train.config_file import plain_values, write_config


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def config(folder: RunFolder, resume: str = "none", **training: object) -> JobConfig:
    return JobConfig(
        output=str(folder.root),
        model=ModelConfig(name="m"),
        data=DataConfig(name="d"),
        training=TrainingConfig(resume=resume, **training),
    )


def find_past(folder: RunFolder, resume_from: str = "latest", **training: object) -> Past:
    job = config(folder, resume_from, **training)
    past = resume.find_past(folder, plain_values(job))
    assert past is not None
    return past


def refuse(folder: RunFolder, told: str, **training: object) -> None:
    with pytest.raises(ResumeError, match=told):
        find_past(folder, **training)


def begin(folder: RunFolder, *steps: int) -> None:
    write_config(folder.config, config(folder))
    write_json(folder.run, {"status": "running", "budget": 10, "metrics_before": {"loss": 1.0}})
    for step in steps:
        checkpoint = folder.checkpoints / f"checkpoint-{step}"
        (checkpoint / "deep").mkdir(parents=True)
        state = TrainerState(global_step=step, stateful_callbacks=[TrainerControl()])
        state.log_history = [{"loss": math.nan}]  # the file holds Python's NaN
        state.save_to_json(str(checkpoint / "trainer_state.json"))
        (checkpoint / "deep" / "optimizer.pt").write_bytes(bytes(100))
        seal(checkpoint, step=step, train=2.5, evaluation=0.5)


def test_the_newest_complete_checkpoint_is_the_latest(folder: RunFolder) -> None:
    begin(folder, 5, 90, 100)
    write_json(folder.checkpoints / "checkpoint-110" / "trainer_state.json", {})
    newest = folder.checkpoints / "checkpoint-100"
    shutil.copytree(newest, newest.with_name("checkpoint-999-keep"))  # a user's copy
    (newest / "later").write_text("not in the seal")
    assert sorted(complete_checkpoints(folder.checkpoints)) == [5, 90, 100]
    past = find_past(folder)
    assert past.checkpoint == newest
    assert (past.step, past.train_seconds, past.eval_seconds) == (100, 2.5, 0.5)
    assert past.run["metrics_before"] == {"loss": 1.0}
    assert math.isnan(past.log[0]["loss"])
    assert past.source.root == folder.root.resolve()
    check_same_task(past, {"budget": 10, "unknown to old runs": 3})
    with pytest.raises(ResumeError, match=r"`budget` of .*run\.json is 10 and now 20"):
        check_same_task(past, {"budget": 20})


def test_a_lost_run_json_is_no_obstacle(folder: RunFolder, tmp_path: Path) -> None:
    begin(folder, 5)
    folder.run.unlink()
    past = find_past(RunFolder(tmp_path / "other"), str(folder.checkpoints / "checkpoint-5"))
    assert past.run == {}


def test_any_other_setting_that_differs_is_named(folder: RunFolder) -> None:
    begin(folder, 5)
    refuse(folder, r"1 key differs: training\.seed \(was 0, now 7\)", seed=7)
    refuse(folder, "2 keys differ", seed=7, epochs=1)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (cut_short, r"optimizer\.pt has other content than was written"),
        (flip_a_bit, r"optimizer\.pt has other content than was written"),
        (Path.unlink, r"optimizer\.pt is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_file_and_latest_good_passes_it_over(
    folder: RunFolder, harm: Callable[[Path], None], told: str
) -> None:
    begin(folder, 5, 10)
    harm(folder.checkpoints / "checkpoint-10" / "deep" / "optimizer.pt")
    refuse(folder, told)
    past = find_past(folder, "latest-good")
    assert past.step == 5
    (reason,) = past.skipped
    assert re.search(told, reason)
    harm(folder.checkpoints / "checkpoint-5" / "deep" / "optimizer.pt")
    refuse(folder, f"got 2 of which none is.*{told}", resume_from="latest-good")


def test_latest_good_passes_over_checkpoints_that_were_not_completed(folder: RunFolder) -> None:
    begin(folder, 5, 10, 15)
    (folder.checkpoints / "checkpoint-15" / "job.json").unlink()
    (folder.checkpoints / "checkpoint-20").mkdir()
    past = find_past(folder, "latest-good")
    assert past.step == 10
    assert [re.search(r"checkpoint-\d+", reason)[0] for reason in past.skipped] == [
        "checkpoint-20",
        "checkpoint-15",
    ]


PROGRESS: dict[str, Any] = {
    "step": 5, "seconds": {"training_steps": 2.5, "evaluation": 0.5}, "files": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        "", '{"step": 5}',
        *(
            json.dumps(PROGRESS | changed)
            for changed in (
                {"step": math.inf}, {"step": -5}, {"step": True},
                {"seconds": {"training_steps": math.nan, "evaluation": 0.5}},
                {"seconds": {}}, {"files": {"optimizer.pt": 7}},
            )
        ),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused_by_its_name(folder: RunFolder, content: str) -> None:
    begin(folder, 5)
    (folder.checkpoints / "checkpoint-5" / "job.json").write_text(content)
    refuse(folder, r"without a readable job\.json")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"unknown": 7}, "unknown"),
        ("[]", "not an object"),
    ],
)
def test_a_trainer_state_of_another_version_is_refused_and_latest_good_passes_it_over(
    folder: RunFolder, changed: dict[str, Any] | str, told: str
) -> None:
    begin(folder, 2, 5)
    checkpoint = folder.checkpoints / "checkpoint-5"
    path = checkpoint / "trainer_state.json"
    given = json.loads(path.read_text())
    path.write_text(changed if isinstance(changed, str) else json.dumps(given | changed))
    seal(checkpoint, step=5, train=2.5, evaluation=0.5)
    refuse(folder, rf"(?s)trainer_state\.json.*checkpoint-5.*{told}")
    assert find_past(folder, "latest-good").step == 2


def test_a_record_of_another_kind_is_refused_by_its_name(folder: RunFolder) -> None:
    begin(folder, 5)
    write_json(folder.run, {"metrics_before": {"loss": "low"}})
    with pytest.raises(RunFileError, match=r"run\.json must be as .*metrics_before"):
        find_past(folder)


def test_a_checkpoint_without_a_format_is_read_and_one_of_a_newer_format_named_and_passed_over(
    folder: RunFolder,
) -> None:
    begin(folder, 5, 10)
    for step, version in ((5, {}), (10, {"format": 2, "dynlora": "9.8"})):
        path = folder.checkpoints / f"checkpoint-{step}" / "job.json"
        values = json.loads(path.read_text())
        assert (values.pop("format"), values.pop("dynlora")) == (1, metadata.version("dynlora"))
        path.write_text(json.dumps(values | version))
    refuse(folder, r"job\.json was written by dynlora 9\.8, format 2;")
    assert find_past(folder, "latest-good").step == 5


VALUES: dict[str, Any] = {
    "config": {}, "budget": 10, "budget_left": 8, "max_rank": 4, "step": 3, "frozen": False,
    "timetable": {"events": [3], "late_events": [], "search": None, "enough": 1},
    "search": {"start_loss": None, "lost": 0.0},
    "layers": {"a": {"r": 2, "scaling": 2.0, "unit": 1.0}}, "history": [], "skipped": {},
    "unreached": [], "seconds": 0.5, "peak_parameters": 10,
}  # fmt: skip
STATE = VALUES | {
    "importance": {"a/mean": torch.ones(2)},
    "features": {},
    "extensions": {"input_adaptive/thresholds": torch.zeros(1)},
}


def test_a_state_is_read_as_it_was_saved(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    found = load_state(tmp_path)
    assert found.keys() == STATE.keys()
    assert {key: found[key] for key in VALUES} == VALUES
    assert torch.equal(found["importance"]["a/mean"], torch.ones(2))
    assert list(found["extensions"]) == ["input_adaptive/thresholds"]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    (tmp_path / "dynlora.json").write_text(json.dumps(VALUES | {"format": 2, "dynlora": "9.8"}))
    told = r"dynlora\.json was written by dynlora 9\.8, format 2; this version reads up to 1"
    with pytest.raises(ResumeError, match=told):
        load_state(tmp_path)
