"""`dynlora eval`: the run's own numbers again, other splits and files, and input to be mended."""

import json
import re
import shutil

import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import tensor
from torch.nn.functional import cross_entropy

from dynlora.cli.main import main
from tests.cli.finished import facts, finish, read_json, read_lines, stock_logits
from tests.jobs import make_rows, missing, save_model, snapshot, write_rows
from tests.strange_models import reconfigure

AFTER = "metrics_after"


@pytest.mark.parametrize("method", ["dynamic", "lora", "adalora", "full"])
def test_the_validation_metrics_are_those_that_the_run_ended_with(said, finished_by, method):
    run = finished_by(method)
    before = snapshot(run)
    values = said("eval", run)
    if method == "adalora":
        # PEFT saves it without its masked directions, so products have another inner length.
        assert values["metrics"] == pytest.approx(facts(run)[AFTER], abs=1e-6)
    else:
        assert values["metrics"] == facts(run)[AFTER]
    assert (values["split"], values["rows"], values["method"]) == ("validation", 16, method)
    assert snapshot(run) == before


def test_any_split_gets_the_metrics_that_stock_libraries_find(
    said, finished, tmp_path, model, data
):
    rows = make_rows(21, seed=9)
    folder = shutil.copytree(data, tmp_path / "with_test")
    write_rows(folder / "test.jsonl", rows)
    values = said("eval", finished, "--data", folder, "--split", "test")
    logits = stock_logits(finished, model, [row["text"] for row in rows])
    labels, guesses = [row["label"] for row in rows], logits.argmax(dim=-1).tolist()
    expected = {
        "accuracy": accuracy_score(labels, guesses),
        "f1": f1_score(labels, guesses),
        "matthews": matthews_corrcoef(labels, guesses),
        "loss": float(cross_entropy(logits, tensor(labels))),
    }
    assert values["metrics"] == pytest.approx(expected, abs=1e-5)
    assert values["split"] == "test"
    assert values["classes"] == [
        {"name": None, "labelled": labels.count(place), "predicted": guesses.count(place)}
        for place in (0, 1)
    ]


def test_a_file_is_evaluated_whole_and_a_folder_needs_only_the_split_that_is_asked_for(
    said, finished, tmp_path, data
):
    file = write_rows(tmp_path / "other.csv", read_lines(data / "validation.jsonl"))
    values = said("eval", finished, "--data", file)
    assert (values["metrics"], values["source"]) == (facts(finished)[AFTER], str(file))
    folder = tmp_path / "data"
    write_rows(folder / "validation.jsonl", make_rows(5))
    write_rows(folder / "test.csv", make_rows(3))
    for options, count in (
        (["--split", "train"], 48),
        (["--data", folder], 5),
        (["--data", folder, "--split", "test"], 3),
    ):
        assert said("eval", finished, *options)["rows"] == count


def test_the_rows_held_out_of_a_single_file_are_found_again(said, refused, tmp_path, model):
    file = write_rows(tmp_path / "all.jsonl", make_rows(50))
    held_out = ("--data.validation_fraction=0.3", "--data.max_validation_rows=9")
    run = finish(tmp_path, model, file, "--method=lora", "--training.max_steps=3", *held_out)
    assert facts(run)["rows"] == {"train": 35, "validation": 9}
    values = said("eval", run)
    assert values["rows"] == 9
    assert values["metrics"] == facts(run)[AFTER]
    assert "train or validation, got test" in refused("eval", run, "--split", "test")


def test_the_batch_size_changes_no_metric(said, finished):
    one, many = (said("eval", finished, "--batch-size", size)["metrics"] for size in (1, 16))
    assert one == pytest.approx(many, abs=1e-6)


def test_a_base_model_that_has_moved_is_found_with_an_option(said, refused, copy, tmp_path, model):
    moved = shutil.copytree(model, tmp_path / "moved")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(model), "/nowhere/model"))
    assert "/nowhere/model" in refused("eval", copy)
    assert said("eval", copy, "--model", moved)["metrics"] == facts(copy)[AFTER]


def test_a_model_that_gives_every_row_one_class_is_said_to_have_collapsed(said, copy, data, capsys):
    predicted = said("predict", copy, data / "train.jsonl")["predictions"]
    found = [row["prediction"] for row in predicted]
    rows = read_lines(data / "train.jsonl")
    one = [row for row, guess in zip(rows, found, strict=True) if guess == found[0]]
    file = write_rows(copy / "one.jsonl", one)
    values = said("eval", copy, "--data", file)
    assert values["collapsed"] == found[0]
    assert values["classes"][found[0]]["predicted"] == len(one)
    assert main(["eval", str(copy), "--data", str(file)]) == 0
    assert f"every row was given class {found[0]}" in capsys.readouterr().out


def test_the_result_is_written_only_where_nothing_is_lost(said, refused, finished, tmp_path):
    file = tmp_path / "new" / "result.json"
    assert said("eval", finished, "--output", file) == read_json(file)
    for options, told in (
        ([file], "a file that exists"),
        ([tmp_path, "--overwrite"], "a folder"),
        ([file / "result.json"], "a path must be accessible"),
    ):
        assert told in refused("eval", finished, "--output", *options)
    said("eval", finished, "--split", "train", "--output", file, "--overwrite")
    assert read_json(file)["rows"] == 48


def test_what_is_not_a_finished_run_is_refused(refused, copy, tmp_path):
    assert "with a run.json, got" in refused("eval", tmp_path / "nowhere")
    assert f"give {copy}" in refused("eval", copy / "adapter")
    values, command = facts(copy), f"`dynlora train {copy / 'config.yaml'} --output {copy} "
    for status, told in (("running", "still running"), ("interrupted", "stopped by its user")):
        (copy / "run.json").write_text(json.dumps(values | {"status": status}))
        message = refused("eval", copy)
        assert missing(message, told, f"{command}--training.resume latest") == []
    shutil.rmtree(copy / "checkpoints")
    assert f"{command}--overwrite true`" in refused("eval", copy)
    (copy / "run.json").write_text("{")
    assert "run.json must be one whole JSON object" in refused("eval", copy)
    (copy / "run.json").write_text(json.dumps({"status": "failed", "method": "lora"}))
    assert "ended with an error" in refused("predict", copy, tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_labels": "two"}, "`num_labels`.*got.*two"),
        ({"format": 3, "dynlora": "9.8"}, "by dynlora 9.8, format 3; this version reads up to 1"),
    ],
)
def test_a_record_that_this_version_cannot_use_is_refused(refused, copy, change, told):
    (copy / "run.json").write_text(json.dumps(facts(copy) | change))
    assert re.search(told, refused("eval", copy))


@pytest.mark.parametrize(
    "name", ["config.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
)
def test_a_file_that_is_missing_is_named(refused, copy, name):
    (copy / name).unlink()
    assert f"must hold {name}, which is missing" in refused("eval", copy)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_were_cut_short_are_refused(refused, finished_by, tmp_path, method):
    run = shutil.copytree(finished_by(method), tmp_path / "copy")
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2])
    assert str((run / name).parent) in refused("eval", run)


def test_a_base_model_that_does_not_fit_is_refused(refused, finished_by, finished, tmp_path, model):
    wide = save_model(tmp_path / "wide", hidden=20)
    for method in ("lora", "adalora"):
        message = refused("eval", finished_by(method), "--model", wide)
        assert missing(message, "bert.encoder.layer.0", "16", "20") == []
    short = shutil.copytree(model, tmp_path / "short")
    reconfigure(short, num_hidden_layers=1)
    assert "no module 'bert.encoder.layer.1" in refused("eval", finished, "--model", short)
    message = refused("eval", finished, "--model", "someone/some-model")
    assert "of someone/some-model could not be loaded" in message
    assert "no config.json" in refused("eval", finished, "--model", "/nowhere/model")
    assert "holds the whole model" in refused("eval", finished_by("full"), "--model", model)


def test_rows_that_are_not_there_are_refused(refused, finished, tmp_path):
    message = refused("eval", finished, "--split", "tset")
    assert missing(message, "the data must hold one file named tset | Name a split") == []
    assert "data." not in message.replace("data.path", "")
    assert "training" not in message
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    (tmp_path / "empty.jsonl").write_text("")
    for options, told in (
        ([tmp_path], "the data must hold one file named validation | Name a split"),
        (["/nowhere/rows.csv"], "a path must be accessible, but got /nowhere/rows.csv"),
        ([rows, "--split", "test"], "--split test"),
        ([tmp_path / "rows.xlsx"], "must end in .parquet"),
        ([tmp_path / "empty.jsonl"], "at least 1 row, got 0"),
    ):
        assert missing(refused("eval", finished, "--data", *options), told) == []


def test_rows_that_do_not_hold_what_is_needed_are_counted_and_shown(refused, finished, tmp_path):
    without = [row | {"label": None if n in (3, 7) else 0} for n, row in enumerate(make_rows(12))]
    for rows, told in (
        (without, "2 of 12 rows | None in row 3, None in row 7"),
        ([row | {"label": 2} for row in make_rows(5)], "classes in [0, 1]"),
        ([{"sentence": "red"}], "`data.label` names the column 'label'"),
    ):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        assert missing(refused("eval", finished, "--data", file), told) == []


def test_exact_answers_are_not_counted_for_classes(refused, finished):
    assert "needs a run that writes texts" in refused("eval", finished, "--exact-match")
