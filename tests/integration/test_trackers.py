"""Trackers get ranks under stable names, with and without the command line, and change nothing."""

import importlib.util
import json
import os
import sqlite3
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynlora.cli.main import main
from dynlora.errors import ConfigError
from dynlora.importance.agreement import AgreementTest
from dynlora.integrations.trackers import rank_figures, track_ranks
from dynlora.train.trackers import tracking
from tests.integration.test_trainer import assert_equal_weights, lora_weights, trainer_of
from tests.jobs import job_values, save_model, write_data, write_job
from tests.models import lora_llama
from tests.processes import run_in_group

Lines = list[dict[str, Any]]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Return a job of 12 steps with events at 3, 6 and 9."""
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "data")
    return write_job(tmp_path / "job.yaml", job_values(model, data, tmp_path / "run"))


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AgreementTest, "is_significant", lambda self: True)


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Read TensorBoard's files back with TensorBoard: value by step by tag."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for tag, values in scalars.items():
        if tag.startswith(("ranks/", "dynamic/")) or tag == "train/loss":
            assert len({event.step for event in values}) == len(values), tag
    return {tag: {e.step: e.value for e in values} for tag, values in scalars.items()}


def read_lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(events: Lines, initial: dict[str, int]) -> dict[str, dict[int, float]]:
    """Return what the trackers must hold, from the run's own `ranks.jsonl`."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for name, rank in initial.items():
        found[f"ranks/{name}"][0] = rank
    for event in events:
        layers = event["layers"]
        for name, layer in layers.items():
            found[f"ranks/{name}"][event["step"]] = layer["rank_after"]
        ranks = [layer["rank_after"] for layer in layers.values()]
        found["ranks/mean"][event["step"]] = sum(ranks) / len(ranks)
        found["dynamic/parameters"][event["step"]] = event["parameters"]
        found["dynamic/agreement"][event["step"]] = event["agreement"]
        moved = sum(x["rank_before"] != x["rank_after"] for x in layers.values())
        found["dynamic/moved_layers"][event["step"]] = moved
    return found


@pytest.mark.usefixtures("moving")
def test_tensorboard_gets_metrics_and_ranks_of_a_job(job: Path, tmp_path: Path) -> None:
    assert main(["train", str(job), "--training.report_to", "[tensorboard]", "--quiet"]) == 0
    run = tmp_path / "run"
    found = read_scalars(run / "tracking" / "tensorboard")
    events = read_lines(run / "ranks.jsonl")
    initial = {name: layer["rank_before"] for name, layer in events[0]["layers"].items()}
    wanted = expected(events, initial)
    assert {tag for tag in found if tag.startswith(("ranks/", "dynamic/"))} == wanted.keys()
    assert any(len(set(found[f"ranks/{name}"].values())) > 1 for name in initial), "ranks moved"
    for tag, values in wanted.items():
        for step, value in values.items():
            assert found[tag][step] == pytest.approx(value, rel=1e-6), (tag, step)
    assert sorted(found["train/loss"]) == list(range(1, 13))
    assert {"eval/loss", "eval/accuracy"} <= found.keys()


@pytest.mark.usefixtures("moving")
def test_a_resumed_job_is_tracked_as_one_run_without_a_step_twice(
    job: Path, tmp_path: Path
) -> None:
    track = ["--training.report_to", "[tensorboard]", "--quiet"]
    assert main(["train", str(job), *track]) == 0
    folder = tmp_path / "run" / "tracking" / "tensorboard"
    whole = read_scalars(folder)
    for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-12"):
        (path / "job.json").unlink()  # as if the run had been killed before step 12
    assert main(["train", str(job), *track, "--training.resume", "latest"]) == 0
    resumed = read_scalars(folder)
    assert sorted(resumed["train/loss"]) == list(range(1, 13))
    for tag in whole:
        if tag.startswith(("ranks/", "dynamic/", "train/loss")):
            kept = {step: value for step, value in resumed[tag].items() if step in whole[tag]}
            assert kept == whole[tag], tag


def test_a_new_run_in_the_same_place_does_not_keep_the_old_ones_figures(
    job: Path, tmp_path: Path
) -> None:
    track = ["--training.report_to", "[tensorboard]", "--quiet"]
    assert main(["train", str(job), *track]) == 0
    assert main(["train", str(job), *track, "--overwrite", "true", "--training.epochs", "1"]) == 0
    found = read_scalars(tmp_path / "run" / "tracking" / "tensorboard")
    assert max(found["train/loss"]) == 6


def test_a_missing_package_is_named_before_anything_is_written(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "dynlora.train.trackers.find_spec", lambda name: None if name == "wandb" else real(name)
    )
    assert main(["train", str(job), "--training.report_to", "[tensorboard, wandb]"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: `training.report_to` needs the package of each tracker, ")
    assert "`pip install wandb`" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["[mlflow]", "[tensorboard, mlflow]", "tensorboard"])
def test_an_unknown_tracker_is_told_those_known(
    given: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(job), "--training.report_to", given]) == 2
    printed = capsys.readouterr().err
    assert "`training.report_to` must be a list of tensorboard, wandb, trackio" in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    trainer, _ = trainer_of(lora_llama(), tmp_path)
    before = list(trainer.callback_handler.callbacks)

    def interrupted() -> None:
        with tracking(trainer, ["tensorboard"], tmp_path / "t", steps_done=0, ranks=True):
            assert len(trainer.callback_handler.callbacks) == len(before) + 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert trainer.callback_handler.callbacks == before


def test_tracking_ranks_changes_neither_weights_nor_random_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    runs = []
    for tracked in (False, True):
        trainer, _ = trainer_of(
            lora_llama(r=8), tmp_path, report_to=["tensorboard"] if tracked else "none"
        )
        if tracked:
            track_ranks(trainer)
        trainer.train()
        # Python's own state is not compared: the type checks in tests draw from it.
        states = (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        runs.append((lora_weights(trainer.model), states))
    assert_equal_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("without", ["tracker", "dynamic"])
def test_ranks_without_a_tracker_or_a_source_are_refused(without: str, tmp_path: Path) -> None:
    report_to = "none" if without == "tracker" else ["tensorboard"]
    trainer, callback = trainer_of(lora_llama(), tmp_path, report_to=report_to)
    if without == "dynamic":
        trainer.remove_callback(callback)
    with pytest.raises(ConfigError, match="needs a `DynamicLoraCallback` and a tracker"):
        track_ranks(trainer)


def test_the_names_are_those_promised() -> None:
    assert rank_figures({"layers.0.q_proj": 3, "layers.0.v_proj": 6}, 288) == {
        "ranks/layers.0.q_proj": 3.0,
        "ranks/layers.0.v_proj": 6.0,
        "ranks/mean": 4.5,
        "dynamic/parameters": 288.0,
    }


def run_apart(job: Path, tracker: str, **environment: str) -> None:
    """Run a job in a process of its own: trackers keep their state in their modules."""
    unset = ("WANDB_MODE", "WANDB_API_KEY", "TRACKIO_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    script = (
        "import sys; from dynlora.cli.main import main\n"
        "from dynlora.importance.agreement import AgreementTest\n"
        "AgreementTest.is_significant = lambda self: True\n"
        f"sys.exit(main(['train', {str(job)!r}, '--training.report_to', '[{tracker}]', '--json']))"
    )
    done = run_in_group(
        [sys.executable, "-c", script],
        capture_output=True, text=True, env=kept | environment, cwd=job.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "dynamic"
    assert "\x1b" not in done.stderr


def test_trackio_gets_metrics_and_ranks_in_the_runs_folder(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio", exc_type=ImportError)
    run_apart(job, "trackio")
    database = tmp_path / "run" / "tracking" / "trackio" / "dynlora.db"
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in rows} == {"run"}
    logged = [json.loads(metrics) for _, metrics in rows]
    check_logged(logged, tmp_path / "run")


def check_logged(logged: Lines, run: Path) -> None:
    """Check figures logged as dictionaries with their step."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in logged:
        for tag, value in line.items():
            found[tag][line["train/global_step"]] = value
    events = read_lines(run / "ranks.jsonl")
    initial = {name: layer["rank_before"] for name, layer in events[0]["layers"].items()}
    for tag, values in expected(events, initial).items():
        for step, value in values.items():
            assert found[tag][step] == pytest.approx(value), (tag, step)
    assert sorted(found["train/loss"]) == list(range(1, 13))
    assert "eval/accuracy" in found


def test_wandb_gets_metrics_and_ranks_offline_in_the_runs_folder(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", exc_type=ImportError, reason="needs `pip install wandb`")
    run_apart(job, "wandb", HOME=str(tmp_path))
    (folder,) = (tmp_path / "run" / "tracking" / "wandb" / "wandb").glob("offline-run-*")
    (store,) = folder.glob("run-*.wandb")
    content = store.read_bytes()
    for tag in (b"dynamic/parameters", b"ranks/mean", b"train/loss"):
        assert tag in content


class FakeWandb(types.ModuleType):
    """What the Trainer's integration and ours call of wandb, each call written down."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.run: Any = None
        self.logged: Lines = []
        self.started: list[dict[str, Any]] = []
        self.finished = 0
        self.errors = types.SimpleNamespace(Error=OSError)
        self.config: dict[str, Any] = Config()
        self.refuse = ""

    def init(self, **given: Any) -> None:
        if self.refuse:
            raise OSError(self.refuse)
        self.started.append(given)
        self.run = types.SimpleNamespace(summary={}, _label=lambda **_: None)

    def log(self, values: dict[str, Any]) -> None:
        assert self.run is not None, "a run must have begun"
        self.logged.append(values)

    def finish(self) -> None:
        self.run, self.finished = None, self.finished + 1

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given


class Config(dict[str, Any]):
    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    parts = ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util")
    for part in parts[1:]:
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[parts[-1]].ConfigError = ValueError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", bool_true)
    for key in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(key, raising=False)
    return fake


def bool_true() -> bool:
    return True


@pytest.mark.usefixtures("moving")
def test_wandb_is_offline_unless_the_environment_configures_it(
    job: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--training.report_to", "[wandb]", "--quiet"]
    assert main(["train", str(job), *options]) == 0
    (started,) = wandb.started
    assert started["mode"] == "offline"
    assert started["dir"] == str(tmp_path / "run" / "tracking" / "wandb")
    assert (started["project"], started["name"]) == ("dynlora", "run")
    assert started["settings"] == {"silent": True, "console": "off"}
    assert wandb.finished == 1
    check_logged(wandb.logged, tmp_path / "run")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert main(["train", str(job), *options, "--overwrite", "true"]) == 0
    assert (wandb.started[1]["mode"], wandb.started[1]["project"]) == (None, "mine")

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert main(["train", str(job), *options, "--overwrite", "true"]) == 0
    assert wandb.started[2]["mode"] is None


def test_a_wandb_that_refuses_ends_the_run_with_its_words(
    job: Path, tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.refuse = "no such user"
    assert main(["train", str(job), "--training.report_to", "[wandb]", "--quiet"]) == 2
    printed = capsys.readouterr().err
    assert "wandb can start, got: no such user. Set WANDB_MODE=offline" in printed
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
