"""Trackers get ranks under stable names, with and without the command line, and change nothing."""

import importlib.util
import io
import json
import os
import re
import shutil
import sqlite3
import sys
import types
from collections import defaultdict
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynlora.cli.main import main
from dynlora.errors import ConfigError
from dynlora.importance.agreement import AgreementTest
from dynlora.integrations.trackers import track_ranks
from dynlora.train.trackers import tracking
from tests.integration.test_trainer import trainer_of
from tests.jobs import job_values, save_model, write_data, write_job
from tests.models import lora_llama
from tests.processes import run_in_group

Lines = list[dict[str, Any]]
DRAWN = {"dynamic/ranks", "dynamic/rank_map"}
BOARD = ("--training.report_to", "[tensorboard]")


@pytest.fixture(scope="module")
def moving():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgreementTest, "is_significant", lambda self: True)
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return a job of 12 steps with events at 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("job")
    model, data = save_model(folder / "model"), write_data(folder / "data")
    return write_job(folder / "job.yaml", job_values(model, data, folder / "run"))


def train(job, output, *options):
    return main(["train", str(job), "--output", str(output), "--quiet", *options])


@pytest.fixture(scope="module")
def tracked(job, moving, tmp_path_factory):
    """Return the folder of a run in TensorBoard, beside the random state after it."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    with redirect_stdout(io.StringIO()) as printed:
        assert train(job, run, *BOARD, "--json") == 0
    torch.save(torch.get_rng_state(), run.parent / "random.pt")
    assert json.loads(printed.getvalue())["places"]["trackers"] == str(run / "tracking")
    return run


def read_board(folder):
    """Read TensorBoard files back with TensorBoard: value by step by tag."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for tag, values in scalars.items():
        if of_ranks(tag) or tag == "train/loss":
            assert len({event.step for event in values}) == len(values), tag
    return {tag: {e.step: e.value for e in values} for tag, values in scalars.items()}


def read_scalars(run):
    return read_board(run / "tracking" / "tensorboard")


def of_ranks(tag):
    return tag.startswith(("ranks/", "dynamic/")) and tag not in DRAWN


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(events):
    """Return the figures of ranks in trackers, from the run's own `ranks.jsonl`."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for name, layer in events[0]["layers"].items():
        found[f"ranks/{name}"][0] = layer["rank_before"]
    for event in events:
        layers, step = event["layers"], event["step"]
        for name, layer in layers.items():
            found[f"ranks/{name}"][step] = layer["rank_after"]
        ranks = [layer["rank_after"] for layer in layers.values()]
        found["ranks/mean"][step] = sum(ranks) / len(ranks)
        found["dynamic/parameters"][step] = event["parameters"]
        found["dynamic/agreement"][step] = event["agreement"]
        moved = sum(x["rank_before"] != x["rank_after"] for x in layers.values())
        found["dynamic/moved_layers"][step] = moved
    return found


def check_figures(found, events):
    wanted = expected(events)
    assert {tag for tag in found if of_ranks(tag)} == wanted.keys()
    for tag, values in wanted.items():
        for step, value in values.items():
            assert found[tag][step] == pytest.approx(value, rel=1e-6), (tag, step)


def check_logged(logged, run):
    """Check figures logged as dictionaries with their step."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in logged:
        for tag, value in line.items():
            found[tag][line["train/global_step"]] = value
    check_figures(found, read_lines(run / "ranks.jsonl"))
    assert sorted(found["train/loss"]) == list(range(1, 13))
    assert "eval/accuracy" in found
    steps = [event["step"] for event in read_lines(run / "ranks.jsonl")]
    assert [list(found[tag]) for tag in sorted(DRAWN)] == [steps, steps]


def test_tensorboard_gets_metrics_and_ranks_of_a_job(tracked):
    found = read_scalars(tracked)
    check_figures(found, read_lines(tracked / "ranks.jsonl"))
    assert any(len(set(found[tag].values())) > 1 for tag in found if tag.startswith("ranks/"))
    assert sorted(found["train/loss"]) == list(range(1, 13))
    assert {"eval/loss", "eval/accuracy"} <= found.keys()
    written = yaml.safe_load((tracked / "config.yaml").read_text())
    assert written["training"]["report_to"] == ["tensorboard"]


def test_tensorboard_gets_a_histogram_and_a_picture_of_the_ranks_at_each_event(tracked):
    kept = {"histograms": 0, "images": 0}  # all
    board = EventAccumulator(str(tracked / "tracking" / "tensorboard"), size_guidance=kept)
    board.Reload()
    events = read_lines(tracked / "ranks.jsonl")
    ranks = [[layer["rank_before"] for layer in events[0]["layers"].values()]]
    for event, counted, drawn in zip(
        events, board.Histograms("dynamic/ranks"), board.Images("dynamic/rank_map"), strict=True
    ):
        ranks.append([layer["rank_after"] for layer in event["layers"].values()])
        assert counted.step == drawn.step == event["step"]
        assert counted.histogram_value.sum == sum(ranks[-1])
        picture = np.array(Image.open(io.BytesIO(drawn.encoded_image_string)))[4::8, 16::32]
        highest = max(map(max, ranks))
        wanted = [[int(255 * (1 - rank / highest)) for rank in column] for column in ranks]
        assert picture[:, :, 0].T.tolist() == wanted


@pytest.mark.usefixtures("moving")
def test_tracking_changes_nothing_in_a_job(job, tracked, tmp_path):
    """The same weights, random state, history and metrics, bit for bit."""
    plain = tmp_path / "plain"
    assert train(job, plain) == 0
    assert torch.equal(torch.get_rng_state(), torch.load(tracked.parent / "random.pt"))
    assert not (plain / "tracking").exists()
    weights = [load_file(run / "adapter/adapter_model.safetensors") for run in (plain, tracked)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert (plain / "ranks.jsonl").read_bytes() == (tracked / "ranks.jsonl").read_bytes()
    logs = [
        json.loads((run / "checkpoints/checkpoint-12/trainer_state.json").read_text())
        for run in (plain, tracked)
    ]
    for one, other in zip(*(log["log_history"] for log in logs), strict=True):
        assert one.keys() == other.keys()
        assert one.get("loss") == other.get("loss")


@pytest.mark.usefixtures("moving")
def test_a_resumed_run_has_no_step_twice_and_a_new_one_no_old_figures(job, tracked, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tracked, run)
    whole = read_scalars(run)
    (run / "checkpoints/checkpoint-12/job.json").unlink()  # as if killed before step 12
    assert train(job, run, *BOARD, "--training.resume", "latest") == 0
    resumed = read_scalars(run)
    assert sorted(resumed["train/loss"]) == list(range(1, 13))
    for tag in whole:
        if of_ranks(tag) or tag == "train/loss":
            kept = {step: value for step, value in resumed[tag].items() if step in whole[tag]}
            assert kept == whole[tag], tag

    options = ["--method", "lora", "--overwrite", "true", "--training.epochs", "1"]
    assert train(job, run, *BOARD, *options) == 0
    found = read_scalars(run)
    assert max(found["train/loss"]) == 6
    assert not [tag for tag in found if of_ranks(tag)]


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ("[tensorboard, wandb]", "needs the package of each tracker, .*`pip install wandb`"),
        ("[tensorboard, mlflow]", "must be a list of tensorboard, wandb, trackio"),
        ("tensorboard", "must be a list of tensorboard, wandb, trackio"),
    ],
)
def test_a_tracker_that_is_unknown_or_missing_is_refused_before_anything_is_written(
    given, refused, job, tmp_path, capsys, monkeypatch
):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "dynlora.train.trackers.find_spec", lambda name: None if name == "wandb" else real(name)
    )
    assert train(job, tmp_path / "run", "--training.report_to", given) == 2
    printed = capsys.readouterr().err
    assert re.match(f"error: .*`training.report_to` {refused}.*\n$", printed)
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_leaves_the_trainer_as_it_was(tmp_path):
    trainer, _ = trainer_of(lora_llama(), tmp_path)
    before = list(trainer.callback_handler.callbacks)

    def interrupted():
        with tracking(trainer, ["tensorboard"], tmp_path / "t", steps_done=0, ranks=True):
            assert len(trainer.callback_handler.callbacks) == len(before) + 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert trainer.callback_handler.callbacks == before


def test_ranks_of_a_trainer_of_ones_own_are_tracked_and_not_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer, callback = trainer_of(lora_llama(r=8), tmp_path, report_to=["tensorboard"])
    track_ranks(trainer)
    trainer.train()
    check_figures(read_board(tmp_path / "board"), [e.to_dict() for e in callback.dynamic.history])
    logged = {key for line in trainer.state.log_history for key in line}
    assert not [key for key in logged if "ranks" in key or "dynamic" in key]


@pytest.mark.parametrize("without", ["tracker", "dynamic"])
def test_ranks_without_a_tracker_or_a_source_are_refused(without, tmp_path):
    report_to = "none" if without == "tracker" else ["tensorboard"]
    trainer, callback = trainer_of(lora_llama(), tmp_path, report_to=report_to)
    if without == "dynamic":
        trainer.remove_callback(callback)
    with pytest.raises(ConfigError, match="needs a `DynamicLoraCallback` and a tracker"):
        track_ranks(trainer)


def test_trackio_gets_metrics_and_ranks_in_the_runs_folder(job, tmp_path):
    """In a process of its own, because trackio keeps its state in its modules."""
    pytest.importorskip("trackio", exc_type=ImportError)
    words = ["train", str(job), "--output", str(tmp_path / "run"), "--json"]
    script = (
        "import sys; from dynlora.cli.main import main\n"
        "from dynlora.importance.agreement import AgreementTest\n"
        "AgreementTest.is_significant = lambda self: True\n"
        f"sys.exit(main({[*words, '--training.report_to', '[trackio]']!r}))"
    )
    kept = {name: value for name, value in os.environ.items() if name != "TRACKIO_DIR"}
    done = run_in_group(
        [sys.executable, "-c", script], capture_output=True, text=True, env=kept, cwd=job.parent
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "dynamic"
    assert "\x1b" not in done.stderr
    database = tmp_path / "run" / "tracking" / "trackio" / "dynlora.db"
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in rows} == {"run"}
    check_logged([json.loads(metrics) for _, metrics in rows], tmp_path / "run")


@pytest.fixture
def wandb(monkeypatch):
    """Replace wandb, which logs only between `init` and `finish`."""
    fake = MagicMock(run=None, __spec__=importlib.util.spec_from_loader("wandb", loader=None))
    fake.errors.Error = OSError
    fake.init.side_effect = lambda **_: setattr(fake, "run", MagicMock())
    fake.finish.side_effect = lambda: setattr(fake, "run", None)
    fake.log.side_effect = lambda _: fake.run.log()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for part in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules["wandb.sdk.lib.config_util"].ConfigError = ValueError
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.is_wandb_available", lambda: True
    )
    for key in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(key, raising=False)
    return fake


@pytest.mark.usefixtures("moving")
def test_wandb_is_offline_unless_the_environment_configures_it_and_may_refuse(
    job, tmp_path, wandb, monkeypatch, capsys
):
    run = tmp_path / "run"
    assert train(job, run, "--training.report_to", "[wandb]") == 0
    wandb.Settings.assert_called_once_with(silent=True, console="off")
    wandb.init.assert_called_once_with(
        project="dynlora",
        name="run",
        dir=str(run / "tracking" / "wandb"),
        mode="offline",
        settings=wandb.Settings.return_value,
    )
    wandb.finish.assert_called_once()
    check_logged([call.args[0] for call in wandb.log.call_args_list], run)

    wandb.init.side_effect = OSError("no such user")
    for key, value in {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40}.items():
        with monkeypatch.context() as patch:
            patch.setenv(key, value)
            patch.setenv("WANDB_PROJECT", "mine")
            assert train(job, tmp_path / key, "--training.report_to", "[wandb]") == 2
        given = wandb.init.call_args.kwargs
        assert (given["mode"], given["project"]) == (None, "mine")
        printed = capsys.readouterr().err
        assert "wandb can start, got: no such user. Set WANDB_MODE=offline" in printed
        assert json.loads((tmp_path / key / "run.json").read_text())["status"] == "failed"
