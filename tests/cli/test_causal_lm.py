"""`dynlora train` with `task: causal_lm`: every format and method, resumed, and bad input."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora.cli.main import main
from tests.cli.test_resume import assert_same_end, stop_at
from tests.jobs import write_job
from tests.language import (
    language_job,
    make_pairs,
    save_language_model,
    write_pairs,
    write_two_splits,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
Train = Callable[..., int]
Error = Callable[..., str]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama and its tokenizer."""
    return save_language_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 48 training and 16 validation rows in every format."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def job(tmp_path: Path, model: Path, data: Path, output: Path) -> Path:
    """Return the configuration file of a job of 12 steps on prompts and completions."""
    return write_job(tmp_path / "job.yaml", language_job(model, data, output))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def completion_loss(model: Any, folder: Path, data: Path) -> float:
    """Return the mean loss of the completions' tokens, row by row from plain logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for line in (data / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        start = len(tokenizer(row["ask"] + "\n")["input_ids"])
        ids = torch.tensor(tokenizer(f"{row['ask']}\n{row['tell']}<eos>")["input_ids"])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids[None]).logits[0]
        losses.append(cross_entropy(logits[start - 1 : -1], ids[start:], reduction="none"))
    return float(torch.cat(losses).mean())


# peft 0.21 reads AdaLoRA's masks as rank patterns too.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("method", ["dynamic", "adalora"])
def test_stock_peft_loads_the_adapter_and_finds_the_reported_loss(
    train: Train, output: Path, model: Path, data: Path, method: str
) -> None:
    assert train("--method", method, "--adalora.orth_reg_weight", 10) == 0
    run = read_json(output / "run.json")
    base = AutoModelForCausalLM.from_pretrained(model)
    before, after = run["metrics_before"], run["metrics_after"]
    assert completion_loss(base, model, data) == pytest.approx(before["loss"], abs=1e-5)
    loaded = PeftModel.from_pretrained(base, output / "adapter")
    assert completion_loss(loaded, model, data) == pytest.approx(after["loss"], abs=1e-5)
    assert after["loss"] < before["loss"]
    for metrics in (before, after):
        assert set(metrics) == {"token_accuracy", "perplexity", "loss"}
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    config = read_json(output / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(model)
    assert config["task_type"] == "CAUSAL_LM"
    if method == "dynamic":
        assert len(set(run["final_ranks"].values())) > 1, "this test is about ranks that moved"
        assert len(run["final_ranks"]) == 14, "the head has no adapter"


def test_full_training_saves_a_model_with_the_reported_loss(
    train: Train, output: Path, data: Path
) -> None:
    assert train("--method", "full", "--training.learning_rate", 3e-3) == 0
    loaded = AutoModelForCausalLM.from_pretrained(output / "model")
    run = read_json(output / "run.json")
    loss = completion_loss(loaded, output / "model", data)
    assert loss == pytest.approx(run["metrics_after"]["loss"], abs=1e-5)
    assert loss < run["metrics_before"]["loss"] - 0.2


@pytest.mark.parametrize("form", ["text", "as_chat", "messages"])
def test_formats_besides_pairs_are_learned(
    train: Train, job: Path, model: Path, data: Path, output: Path, form: str
) -> None:
    write_job(job, language_job(model, data, output, form))
    assert train("--method", "lora") == 0
    run = read_json(output / "run.json")
    assert run["metrics_after"]["loss"] < run["metrics_before"]["loss"] - 0.1
    assert run["num_labels"] is None
    assert run["texts_cut"] == {"train": 0, "validation": 0}


def test_the_chat_example_runs_on_local_copies(tmp_path: Path, model: Path, data: Path) -> None:
    for split, name in (("train", "train"), ("validation", "test")):
        text = (data / f"{split}.jsonl").read_text().replace('"chat":', '"messages":')
        (tmp_path / f"{name}.jsonl").write_text(text)
    options = {
        "model.path": model,
        "data.path": tmp_path,
        "data.max_length": 48,
        "data.max_new_tokens": 6,
        "training.max_steps": 2,
        "output": tmp_path / "run",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert main(["train", str(EXAMPLES / "chat.yaml"), *words]) == 0
    assert read_json(tmp_path / "run" / "run.json")["rows"] == {"train": 48, "validation": 16}


def test_a_csv_file_of_words_that_look_like_numbers_is_read_as_text(
    train: Train, tmp_path: Path, output: Path
) -> None:
    for split in ("train", "validation"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["ask", "tell"], ["1", "2"], ["3", "4"]])
    assert train("--data.path", tmp_path, "--method", "lora", "--training.max_steps", 2) == 0
    assert read_json(output / "run.json")["rows"] == {"train": 2, "validation": 2}


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(
    ("method", "step", "checkpoint"),
    [("dynamic", 5, 4), ("full", 11, 10)],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    step: int,
    checkpoint: int,
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ("--method", method, "--training.save_steps", 2, "--lora.lora_dropout", 0.1)
    assert train(*options, "--output", whole) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step, SystemExit)
        with pytest.raises(SystemExit):
            train(*options, "--output", stopped)
    assert train(*options, "--output", stopped, "--training.resume", "latest") == 0
    assert read_json(stopped / "run.json")["resumed_from_step"] == checkpoint
    assert_same_end(whole, stopped, method)


@pytest.mark.usefixtures("moving")
def test_the_best_checkpoint_is_found_by_token_accuracy(train: Train, output: Path) -> None:
    options = ("--training.load_best_model_at_end", "true", "--training.save", "epoch")
    assert train(*options, "--training.epochs", 3) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seen = [line["eval_token_accuracy"] for line in lines if line.get("epoch") in (1, 2, 3)
            and "eval_loss" in line]  # fmt: skip
    after = read_json(output / "run.json")["metrics_after"]
    assert after["token_accuracy"] == pytest.approx(max(seen), abs=1e-9)


@pytest.mark.usefixtures("moving")
def test_a_quantized_model_is_trained_and_resumed(
    train: Train, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--method", "dynamic", "--model.quantization", "nf4")
    assert train(*options) == 0
    run = read_json(output / "run.json")
    assert run["metrics_after"]["loss"] < run["metrics_before"]["loss"] - 0.1
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at(patch, 7, SystemExit)
        with pytest.raises(SystemExit):
            train(*options, "--output", stopped)
    assert train(*options, "--output", stopped, "--training.resume", "latest") == 0
    assert_same_end(output, stopped, "dynamic")


@pytest.mark.usefixtures("moving")
def test_a_base_in_bfloat16_gets_an_adapter_in_float32(train: Train, output: Path) -> None:
    from safetensors.torch import load_file

    assert train("--model.dtype", "bfloat16") == 0
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    run = read_json(output / "run.json")
    assert run["metrics_after"]["loss"] < run["metrics_before"]["loss"] - 0.1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data.completion", "null"], ["`data.prompt` and `data.completion`", "only"]),
        (["--data.messages", "chat"], ["`data.messages` must be null with `data.prompt`"]),
        (["--data.prompt", "asks"], ["`data.prompt`", "'asks'", "nearest is 'ask'"]),
        (["--data.max_new_tokens", 0], ["`data.max_new_tokens`", ">= 1", "got 0"]),
        (
            ["--data.max_new_tokens", 64],
            ["`data.max_new_tokens`", "within the 64 tokens", "got 64"],
        ),
        (["--data.max_length", 65], ["`data.max_length`", "at most 64", "got 65"]),
        (["--lora.target_modules", "[lm_head]"], ["leave out", "lm_head", "modules_to_save"]),
        (
            ["--method", "full", "--model.quantization", "nf4"],
            ["`model.quantization`", "null with `method: full`", "got nf4"],
        ),
        (
            ["--method", "full", "--model.dtype", "bfloat16"],
            ["`model.dtype`", "float32 with `method: full`", "got bfloat16"],
        ),
        (["--model.quantization", "nf5"], ["`model.quantization`", "nf4", "int8", "nf5"]),
        (["--training.best_metric", "accuracy"], ["token_accuracy, perplexity, loss"]),
    ],
)
def test_settings_that_do_not_fit_are_told_what_does(
    error: Error, options: list[object], told: list[str]
) -> None:
    message = error(*options)
    for part in told:
        assert part in message


@pytest.mark.parametrize("options", [[], ["--data.as_chat", "true"]])
def test_rows_whose_answers_are_all_empty_are_refused(
    error: Error, tmp_path: Path, options: list[str]
) -> None:
    rows = [row | {"tell": " " * (place % 2)} for place, row in enumerate(make_pairs(6))]
    message = error("--data.path", write_two_splits(tmp_path / "empty", rows), *options)
    assert "column 'tell' must hold an answer to learn in at least one row" in message
    assert "all 6 of the training split" in message


def test_the_length_of_predictions_is_an_option(
    train: Train, output: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--method", "lora", "--training.max_steps", 1) == 0
    capsys.readouterr()
    command = ["predict", str(output), str(data / "validation.jsonl"), "--json"]
    said = {}
    for count in (1, 6, 63):
        assert main([*command, "--max-new-tokens", str(count)]) == 0
        found = json.loads(capsys.readouterr().out)["predictions"]
        said[count] = [row["prediction"] for row in found]
    assert main(command) == 0
    own = [row["prediction"] for row in json.loads(capsys.readouterr().out)["predictions"]]
    assert own == said[6]
    assert said[1] != said[6]
    assert all(long.startswith(short) for short, long in zip(said[1], said[6], strict=True))
    assert main([*command, "--max-new-tokens", "64"]) == 2
    assert "within the 64 tokens" in capsys.readouterr().err


@pytest.mark.usefixtures("chats")
def test_conversations_in_which_nothing_is_answered_are_refused(
    error: Error, tmp_path: Path
) -> None:
    silent = [{"role": "user", "content": "red"}, {"role": "assistant", "content": ""}]
    rows = [row | {"chat": silent} for row in make_pairs(3)]
    message = error("--data.path", write_two_splits(tmp_path / "silent", rows))
    assert "column 'chat' must hold an answer to learn in at least one row" in message


@pytest.fixture
def chats(job: Path, model: Path, data: Path, output: Path) -> Path:
    """Make the job one of conversations."""
    return write_job(job, language_job(model, data, output, "messages"))


def test_what_is_cut_and_what_is_left_out_is_told(
    train: Train, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"ask": "red", "tell": "cat"},
        {"ask": "red", "tell": " ".join(["cat"] * 8)},
        {"ask": " ".join(["red"] * 8), "tell": "cat"},
    ]
    folder = write_two_splits(tmp_path / "long", rows)
    options = ("--data.max_length", 8, "--method", "lora", "--training.max_steps", 1)
    assert train("--data.path", folder, *options) == 0
    told = capsys.readouterr().err
    assert "note: 1 of 3 training rows were left out: within data.max_length=8 tokens" in told
    assert "note: 1 of 2 training and 1 of 2 validation inputs are longer than" in told
    run = read_json(output / "run.json")
    assert run["rows"] == {"train": 2, "validation": 2}
    assert run["texts_cut"] == {"train": 1, "validation": 1}


def test_a_prompt_without_any_token_is_refused_by_its_row(
    train: Train, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--data.separator", "", "--training.max_steps", 1) == 0
    rows = [{"ask": "red"}, {"ask": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["predict", str(output), str(path)]) == 2
    assert "the prompt must have at least one token" in (told := capsys.readouterr().err)
    assert "'' in row 1" in told
