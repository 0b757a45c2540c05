"""`dynlora eval`: the run's own numbers again, other splits and files, and input to be mended."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import tensor
from torch.nn.functional import cross_entropy

from dynlora.cli.main import main
from tests.cli.conftest import snapshot
from tests.cli.finished import finish, read_json, stock_logits
from tests.jobs import make_rows, save_model, write_rows

Evaluate = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Return a runner of `dynlora eval --json`; it returns what was printed."""

    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["eval", *map(str, arguments), "--json"]) == 0
        values: dict[str, Any] = json.loads(capsys.readouterr().out)
        return values

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a runner of `dynlora eval` that must fail; it returns the line after `error: `."""

    def run(folder: Path, *arguments: object) -> str:
        before = snapshot(folder)
        capsys.readouterr()
        assert main(["eval", str(folder), *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert snapshot(folder) == before
        return errors[0].removeprefix("error: ")

    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, to be broken."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.mark.parametrize("method", ["dynamic", "lora", "full"])
def test_the_validation_metrics_are_those_that_the_run_ended_with(
    evaluate: Evaluate, finished_by: Callable[[str], Path], method: str
) -> None:
    run = finished_by(method)
    before = snapshot(run)
    values = evaluate(run)
    assert values["metrics"] == read_json(run / "run.json")["metrics_after"]
    assert (values["split"], values["rows"], values["method"]) == ("validation", 16, method)
    assert snapshot(run) == before


def test_adalora_keeps_its_metrics_up_to_rounding(
    evaluate: Evaluate, finished_by: Callable[[str], Path]
) -> None:
    # PEFT saves AdaLoRA without its masked directions, so the products have another inner length.
    run = finished_by("adalora")
    after = read_json(run / "run.json")["metrics_after"]
    assert evaluate(run)["metrics"] == pytest.approx(after, abs=1e-6)


def test_the_best_checkpoint_is_what_is_evaluated_where_it_was_kept(
    evaluate: Evaluate, tmp_path: Path, model: Path, data: Path
) -> None:
    options = [
        "--method",
        "lora",
        "--training.save",
        "epoch",
        "--training.load_best_model_at_end",
        "true",
    ]
    run = finish(tmp_path, model, data, *options)
    assert evaluate(run)["metrics"] == read_json(run / "run.json")["metrics_after"]


def test_any_split_gets_the_metrics_that_stock_libraries_find(
    evaluate: Evaluate, finished: Path, tmp_path: Path, model: Path, data: Path
) -> None:
    rows = make_rows(21, seed=9)
    folder = shutil.copytree(data, tmp_path / "with_test")
    write_rows(folder / "test.jsonl", rows)
    values = evaluate(finished, "--data", folder, "--split", "test")

    logits = stock_logits(finished, model, [row["text"] for row in rows])
    labels, guesses = [row["label"] for row in rows], logits.argmax(dim=-1).tolist()
    assert values["metrics"] == pytest.approx(
        {
            "accuracy": accuracy_score(labels, guesses),
            "f1": f1_score(labels, guesses),
            "matthews": matthews_corrcoef(labels, guesses),
            "loss": float(cross_entropy(logits, tensor(labels))),
        },
        abs=1e-5,
    )
    assert values["split"] == "test"
    assert values["classes"] == [
        {"name": None, "labelled": labels.count(place), "predicted": guesses.count(place)}
        for place in (0, 1)
    ]


def test_a_file_with_the_same_columns_is_evaluated_whole(
    evaluate: Evaluate, finished: Path, tmp_path: Path, data: Path
) -> None:
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    file = write_rows(tmp_path / "other.csv", rows)
    values = evaluate(finished, "--data", file)
    assert values["metrics"] == read_json(finished / "run.json")["metrics_after"]
    assert values["source"] == str(file)


def test_the_rows_held_out_of_a_single_file_are_found_again(
    evaluate: Evaluate, refused: Refused, tmp_path: Path, model: Path
) -> None:
    file = write_rows(tmp_path / "all.jsonl", make_rows(50))
    options = ("--data.validation_fraction", 0.3, "--data.max_validation_rows", 9)
    run = finish(tmp_path, model, file, "--method", "lora", *options)
    values = evaluate(run)
    assert values["rows"] == 9
    assert values["metrics"] == read_json(run / "run.json")["metrics_after"]
    assert "train or validation, got test" in refused(run, "--split", "test")


def test_the_batch_size_changes_no_metric(evaluate: Evaluate, finished: Path) -> None:
    one, many = evaluate(finished, "--batch-size", 1), evaluate(finished, "--batch-size", 16)
    assert one["metrics"] == pytest.approx(many["metrics"], abs=1e-6)


def test_a_base_model_that_has_moved_is_found_with_an_option(
    evaluate: Evaluate, refused: Refused, copy: Path, tmp_path: Path, model: Path
) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(model), "/nowhere/model"))
    assert "/nowhere/model" in refused(copy)
    expected = read_json(copy / "run.json")["metrics_after"]
    assert evaluate(copy, "--model", moved)["metrics"] == expected


def test_a_model_that_gives_every_row_one_class_is_said_to_have_collapsed(
    evaluate: Evaluate,
    tmp_path: Path,
    model: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row | {"label": int(number == 0)} for number, row in enumerate(make_rows(48))]
    folder = shutil.copytree(data, tmp_path / "data")
    write_rows(folder / "train.jsonl", rows)
    run = finish(tmp_path, model, folder, "--training.max_steps", 40)
    values = evaluate(run)
    assert values["collapsed"] == 0
    assert [row["predicted"] for row in values["classes"]] == [16, 0]
    assert [row["labelled"] for row in values["classes"]] == [8, 8]
    assert main(["eval", str(run)]) == 0
    assert "every row was given class 0" in capsys.readouterr().out


def test_the_table_shows_every_metric(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished)]) == 0
    text = capsys.readouterr().out
    for name, value in read_json(finished / "run.json")["metrics_after"].items():
        assert name in text
        assert f"{value:.4f}" in text


def test_the_result_is_written_only_where_nothing_is_lost(
    evaluate: Evaluate, refused: Refused, finished: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "result.json"
    values = evaluate(finished, "--output", file)
    assert read_json(file) == values
    assert "a file that exists" in refused(finished, "--output", file)
    assert "a folder" in refused(finished, "--output", tmp_path, "--overwrite")
    assert "could not be written" in refused(finished, "--output", file / "result.json")
    assert evaluate(finished, "--split", "train", "--output", file, "--overwrite")["rows"] == 48
    assert read_json(file)["rows"] == 48


def test_what_is_not_a_finished_run_is_refused(
    refused: Refused, copy: Path, tmp_path: Path
) -> None:
    assert "has no run.json" in refused(tmp_path / "nowhere")
    assert f"give {copy}" in refused(copy / "adapter")
    facts = read_json(copy / "run.json")
    for status, told in (("running", "still running"), ("interrupted", "stopped by its user")):
        (copy / "run.json").write_text(json.dumps(facts | {"status": status}))
        message = refused(copy)
        assert told in message
        assert f"{copy / 'config.yaml'} --output {copy} --training.resume latest" in message
        shutil.move(copy / "checkpoints", tmp_path / "elsewhere")
        again = f"`dynlora train {copy / 'config.yaml'} --output {copy} --overwrite true`"
        assert again in refused(copy)
        shutil.move(tmp_path / "elsewhere", copy / "checkpoints")
    (copy / "run.json").write_text("{")
    assert "run.json must be one whole JSON object" in refused(copy)


@pytest.mark.parametrize(
    "name", ["config.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
)
def test_a_file_that_is_missing_is_named(refused: Refused, copy: Path, name: str) -> None:
    (copy / name).unlink()
    message = refused(copy)
    assert f"must hold {name}, which is missing" in message


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", ["lora", "adalora", "full"])
def test_weights_that_were_cut_short_are_refused(
    refused: Refused, finished_by: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    run = shutil.copytree(finished_by(method), tmp_path / "copy")
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2])
    assert str((run / name).parent) in refused(run)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_base_model_of_another_shape_is_refused_with_a_layer_and_both_shapes(
    refused: Refused, finished_by: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    run = finished_by(method)
    wide = save_model(tmp_path / "wide", hidden=20)
    message = refused(run, "--model", wide)
    assert "bert.encoder.layer.0" in message
    assert "16" in message
    assert "20" in message


def test_a_base_model_with_fewer_blocks_is_refused_with_the_layer_it_lacks(
    refused: Refused, finished: Path, tmp_path: Path, model: Path
) -> None:
    short = shutil.copytree(model, tmp_path / "short")
    config = read_json(short / "config.json")
    (short / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "no module 'bert.encoder.layer.1" in refused(finished, "--model", short)


def test_a_base_model_on_the_hub_is_looked_for_there(
    refused: Refused, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(finished, "--model", "someone/some-model")
    assert "of someone/some-model could not be loaded" in message
    assert "no config.json" in refused(finished, "--model", "/nowhere/model")


@pytest.mark.parametrize("value", [None, "two", 0])
def test_a_number_of_outputs_that_is_missing_or_none_is_refused(
    refused: Refused, copy: Path, value: object
) -> None:
    facts = read_json(copy / "run.json")
    (copy / "run.json").write_text(json.dumps(facts | {"num_labels": value}))
    message = refused(copy)
    assert "`num_labels`" in message
    assert str(value) in message.partition("got")[2]


def test_a_run_of_a_newer_format_is_refused_with_its_version(refused: Refused, copy: Path) -> None:
    facts = read_json(copy / "run.json")
    (copy / "run.json").write_text(json.dumps(facts | {"format": 3, "dynlora": "9.8"}))
    assert "was written by dynlora 9.8, format 3; this version reads up to 1" in refused(copy)


def test_a_folder_needs_only_the_split_that_is_asked_for(
    evaluate: Evaluate, finished: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "validation.jsonl", make_rows(5))
    write_rows(tmp_path / "data" / "test.csv", make_rows(3))
    assert evaluate(finished, "--split", "train")["rows"] == 48
    assert evaluate(finished, "--data", tmp_path / "data")["rows"] == 5
    assert evaluate(finished, "--data", tmp_path / "data", "--split", "test")["rows"] == 3


def test_a_full_run_takes_no_other_model(
    refused: Refused, finished_by: Callable[[str], Path], model: Path
) -> None:
    assert "holds the whole model" in refused(finished_by("full"), "--model", model)


def test_rows_that_are_not_there_are_refused(
    refused: Refused, finished: Path, tmp_path: Path, data: Path
) -> None:
    message = refused(finished, "--split", "tset")
    assert "the run's data must hold one file named tset" in message
    assert "`--split`" in message
    assert "data." not in message.replace("data.path", "")
    assert "training" not in message
    message = refused(finished, "--data", tmp_path)
    assert "`--data` must hold one file named validation" in message
    assert "`--split`" in message
    assert "that exists, got /nowhere/rows.csv" in refused(finished, "--data", "/nowhere/rows.csv")
    file = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    assert "--split test" in refused(finished, "--data", file, "--split", "test")
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    assert "must end in .parquet" in refused(finished, "--data", tmp_path / "rows.xlsx")
    (tmp_path / "empty.jsonl").write_text("")
    assert "at least 1 row, got 0" in refused(finished, "--data", tmp_path / "empty.jsonl")


def test_rows_that_do_not_hold_what_is_needed_are_counted_and_shown(
    refused: Refused, finished: Path, tmp_path: Path
) -> None:
    rows = make_rows(12)
    rows[3]["label"] = rows[7]["label"] = None
    file = write_rows(tmp_path / "nulls.jsonl", rows)
    message = refused(finished, "--data", file)
    assert "2 of 12 rows" in message
    assert "None in row 3, None in row 7" in message
    rows = [row | {"label": 2} for row in make_rows(5)]
    message = refused(finished, "--data", write_rows(tmp_path / "high.jsonl", rows))
    assert "classes in [0, 1]" in message
    rows = [{"sentence": "red"}]
    message = refused(finished, "--data", write_rows(tmp_path / "column.jsonl", rows))
    assert "`data.label` names the column 'label'" in message


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--batch-size", 0], "x>=1"), (["--splt", "test"], "No such option '--splt'")],
)
def test_arguments_that_are_not_known_are_refused(
    refused: Refused, finished: Path, arguments: list[object], told: str
) -> None:
    assert told in refused(finished, *arguments)
