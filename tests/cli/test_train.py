"""`dynlora train` from end to end: every method, every kind of file, and what a run leaves."""

import json
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertForSequenceClassification

from dynlora.cli.main import main
from tests.jobs import job_values, make_rows, save_model, write_data, write_job, write_rows

Train = Callable[..., int]
FinishedBy = Callable[[str], Path]
LAYERS = 13  # six in each of two blocks, and the pooler
COST = 12 * 32 - 4 * 32 + 4 * 48 + 32  # by layer: 4 of 16 + 16 and 2 of 16 + 32 a block; pooler


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def task_loss(model: torch.nn.Module, folder: Path, data: Path) -> float:
    """Mean cross-entropy over the validation rows, one by one and without the Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in read_lines(data / "validation.jsonl"):
        inputs = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        losses.append(float(cross_entropy(logits, torch.tensor([row["label"]]))))
    return sum(losses) / len(losses)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_dynamic_run_leaves_everything_that_was_promised(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "adapter", "checkpoints", "config.yaml", "metrics.jsonl", "ranks.jsonl", "ranks.png",
        "run.json",
    }  # fmt: skip
    assert (finished / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {
        "checkpoint-10", "checkpoint-12",
    }  # fmt: skip


def test_run_json_tells_versions_seed_parameters_metrics_seconds_and_memory(
    finished: Path, model: Path, data: Path
) -> None:
    run = read_json(finished / "run.json")
    assert (run["format"], run["dynlora"]) == (1, version("dynlora"))
    assert run["status"] == "finished"
    assert (run["method"], run["seed"], run["steps"]) == ("dynamic", 0, 12)
    assert run["versions"]["torch"] == torch.__version__
    assert set(run["versions"]) >= {"python", "dynlora", "transformers", "peft", "accelerate"}
    assert run["budget"] == 2 * COST
    assert run["parameters"]["start"] == 2 * COST
    assert run["parameters"]["end"] <= run["parameters"]["peak"] <= 2 * COST
    for metrics in (run["metrics_before"], run["metrics_after"]):
        assert set(metrics) == {"loss", "accuracy", "f1", "matthews"}
    untrained = BertForSequenceClassification.from_pretrained(model)
    assert run["metrics_before"]["loss"] == pytest.approx(task_loss(untrained, model, data), 1e-5)
    assert 0 < run["seconds"]["dynamic_part"] < run["seconds"]["training_steps"]
    assert run["seconds"]["evaluation"] > 0
    assert 10**8 < run["peak_memory_bytes"] < 10**11
    assert run["rows"] == {"train": 48, "validation": 16}


def test_each_event_is_a_line_with_step_and_figures_of_every_layer(finished: Path) -> None:
    events = read_lines(finished / "ranks.jsonl")
    assert [event["step"] for event in events] == [3, 6, 9]
    for before, after in pairwise(events):
        for name, layer in after["layers"].items():
            assert layer["rank_before"] == before["layers"][name]["rank_after"]
    for event in events:
        assert len(event["layers"]) == LAYERS
        assert sum(layer["share"] for layer in event["layers"].values()) == pytest.approx(1)
        for layer in event["layers"].values():
            assert set(layer) == {
                "rank_before", "rank_after", "score", "share", "weight", "variance",
                "effective_rank", "output_lost", "waits", "directions",
            }  # fmt: skip
            assert layer["score"] >= 0
            assert layer["weight"] == 1
            assert layer["effective_rank"] >= 1
            assert 0 <= layer["output_lost"] <= 0.1


def test_the_saved_patterns_are_exactly_the_live_ranks(finished: Path) -> None:
    ranks = read_json(finished / "run.json")["final_ranks"]
    assert len(set(ranks.values())) > 1, "this test is about ranks that moved"
    last = read_lines(finished / "ranks.jsonl")[-1]
    assert ranks == {name: layer["rank_after"] for name, layer in last["layers"].items()}

    config = read_json(finished / "adapter" / "adapter_config.json")
    names = {
        rank: [name for name in ranks if ranks[name] == rank] for rank in {*ranks.values()} - {2}
    }
    escaped = {f"^({'|'.join(names[rank])})$".replace(".", r"\."): rank for rank in names}
    assert config["peft_type"] == "LORA"
    assert config["rank_pattern"] == escaped
    assert config["alpha_pattern"] == {key: 2 * rank for key, rank in escaped.items()}

    tensors = adapter(finished)
    for name, rank in ranks.items():
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
        assert tensors[f"base_model.model.{name}.lora_B.weight"].shape[1] == rank


# peft 0.21 reads AdaLoRA's masks as rank patterns too.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("method", ["dynamic", "lora", "adalora"])
def test_stock_peft_loads_the_adapter_and_finds_the_reported_loss(
    finished_by: FinishedBy, model: Path, data: Path, method: str
) -> None:
    run = finished_by(method)
    base = BertForSequenceClassification.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, run / "adapter")
    loss = read_json(run / "run.json")["metrics_after"]["loss"]
    assert task_loss(loaded, model, data) == pytest.approx(loss, abs=1e-4)


def test_full_training_saves_a_model_with_the_reported_loss(
    train: Train, output: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--method", "full", "--training.learning_rate", 1e-3) == 0
    loaded = BertForSequenceClassification.from_pretrained(output / "model")
    run = read_json(output / "run.json")
    total = sum(parameter.numel() for parameter in loaded.parameters())
    assert run["parameters"] == {"start": total, "peak": total, "end": total}
    assert task_loss(loaded, output / "model", data) == pytest.approx(
        run["metrics_after"]["loss"], abs=1e-5
    )
    assert not (output / "adapter").exists()
    assert f"{total:,}" in capsys.readouterr().out


def test_adalora_reports_the_task_loss_and_trains_on_loss_and_penalty(
    train: Train, output: Path, model: Path, data: Path
) -> None:
    assert train("--method", "adalora", "--adalora.orth_reg_weight", 10) == 0
    lines = read_lines(output / "metrics.jsonl")
    untrained = BertForSequenceClassification.from_pretrained(model)
    assert lines[0]["eval_loss"] == pytest.approx(task_loss(untrained, model, data), abs=1e-5)
    # A near-square random factor of rank 3 is at a distance of about 1.7 from orthogonal.
    assert next(line["loss"] for line in lines if "loss" in line) > 10
    run = read_json(output / "run.json")
    masks = read_json(output / "adapter" / "adapter_config.json")["rank_pattern"]
    tensors = adapter(output)
    live = 0
    for name, mask in masks.items():
        layer = "base_model.model." + name.removesuffix(".lora_E")
        features = tensors[f"{layer}.lora_A"].shape[1] + tensors[f"{layer}.lora_B"].shape[0]
        live += sum(mask) * (features + 1)
    assert run["parameters"]["end"] == live < run["parameters"]["start"]
    assert run["budget"] == run["parameters"]["start"] * 2 // 3, "rank 2 of an initial 3"


def test_uniform_importance_is_plain_lora_to_the_last_bit(
    train: Train, output: Path, finished_by: FinishedBy
) -> None:
    assert train("--dynamic.importance", "uniform", "--dynamic.fused", "false") == 0
    plain = finished_by("lora")
    one, other = adapter(plain), adapter(output)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    config = Path("adapter/adapter_config.json")
    assert (plain / config).read_text() == (output / config).read_text()


@pytest.mark.usefixtures("moving")
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    train: Train, tmp_path: Path, finished: Path
) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        assert train("--output", tmp_path / name, "--training.seed", seed) == 0
    path = Path("adapter/adapter_model.safetensors")
    same = (finished / path).read_bytes()
    assert (tmp_path / "same" / path).read_bytes() == same
    assert (tmp_path / "other" / path).read_bytes() != same
    assert (tmp_path / "same/ranks.jsonl").read_text() == (finished / "ranks.jsonl").read_text()


@pytest.mark.usefixtures("moving")
def test_when_a_run_evaluates_and_logs_changes_nothing_it_learns(
    train: Train, tmp_path: Path, finished: Path
) -> None:
    often = ("--training.eval", "steps", "--training.eval_steps", 1, "--training.logging_steps", 1)
    never = ("--training.eval", "no", "--training.save", "no", "--training.logging_steps", 50)
    assert train("--output", tmp_path / "often", *often) == 0
    assert train("--output", tmp_path / "never", "--training.eval_on_start", False, *never) == 0
    expected = adapter(finished)
    for name in ("often", "never"):
        found = adapter(tmp_path / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_json(tmp_path / "never" / "run.json")["metrics_before"] == {}
    assert main(["report", str(tmp_path / "never")]) == 0


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_csv_and_parquet_are_the_same_data_as_jsonl(
    train: Train, tmp_path: Path, finished: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "same rows", ending=ending)
    assert train("--data.path", data, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)["metrics_before"]
    assert found == read_json(finished / "run.json")["metrics_before"]


def test_a_single_file_is_split_into_training_and_validation(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "all.csv", make_rows(40))
    options = ("--data.path", path, "--data.validation_fraction", 0.25, "--dry-run", "--json")
    assert train(*options) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["train_rows"], found["validation_rows"]) == (30, 10)


def test_pairs_of_texts_and_three_classes_train(train: Train, output: Path, tmp_path: Path) -> None:
    rows = [row | {"label": place % 3} for place, row in enumerate(make_rows(32))]
    for split in ("train", "validation"):
        write_rows(tmp_path / "pairs" / f"{split}.parquet", rows)
    options = ("--data.path", tmp_path / "pairs", "--data.text_pair", "other")
    assert train(*options, "--training.epochs", 1) == 0
    run = read_json(output / "run.json")
    assert run["num_labels"] == 3
    assert set(run["metrics_after"]) == {"loss", "accuracy", "f1", "matthews"}


@pytest.mark.usefixtures("moving")
def test_the_resolved_configuration_can_be_fed_back(finished: Path, output: Path) -> None:
    resolved = yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved["training"]["warmup_ratio"] == 0.06, "defaults are written out"
    assert main(["train", str(finished / "config.yaml"), "--output", str(output)]) == 0
    one, other = adapter(finished), adapter(output)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("moving")
def test_the_best_checkpoint_is_what_is_saved_and_reported(
    train: Train, output: Path, model: Path, data: Path
) -> None:
    assert train(
        "--training.load_best_model_at_end", "true", "--training.eval", "steps",
        "--training.eval_steps", 2, "--training.save_steps", 2, "--training.best_metric", "loss",
        "--training.save_total_limit", "null", "--training.learning_rate", 0.1,
    ) == 0  # fmt: skip
    evaluated = [line for line in read_lines(output / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 4, 6, 8, 10, 12]
    best = min(evaluated[1:], key=lambda line: line["eval_loss"])
    (told,) = [line for line in read_lines(output / "metrics.jsonl") if "best_loss" in line]
    assert told["best_loss"] == pytest.approx(best["eval_loss"], abs=1e-6)
    run = read_json(output / "run.json")
    assert run["metrics_after"]["loss"] == pytest.approx(best["eval_loss"], abs=1e-6)
    assert run["best_checkpoint"].endswith(f"checkpoint-{best['step']}")
    base = BertForSequenceClassification.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, output / "adapter")
    assert task_loss(loaded, model, data) == pytest.approx(best["eval_loss"], abs=1e-5)


@pytest.mark.usefixtures("moving")
def test_the_output_is_the_table_alone_and_progress_goes_to_the_error_stream(
    train: Train, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert train() == 0
    captured, run = capsys.readouterr(), read_json(output / "run.json")
    assert "data: 48 training and 16 validation rows, 2 outputs" in captured.err
    assert f"method dynamic: {2 * COST:,} LoRA parameters; 12 steps\n" in captured.err
    assert "step 12/12: validation accuracy" in captured.err
    assert "note:" not in captured.err
    table = captured.out
    assert table.lstrip().startswith("dynlora train: method dynamic")
    for name in ("accuracy", "loss"):
        before, after = run["metrics_before"][name], run["metrics_after"][name]
        assert f"{before:.4f} → {after:.4f}" in table
    assert f"{run['parameters']['end']:,} of the budget of {2 * COST:,}" in table
    ranks = sorted(run["final_ranks"].values())
    assert f"lowest {ranks[0]}, median {ranks[LAYERS // 2]}, highest {ranks[-1]}" in table
    assert f"2 → {ranks[-1]}" in table
    assert f"2 → {ranks[0]}" in table
    share = re.search(r"of it dynamic part .* s \((.*)%\)", table)
    assert share is not None
    expected = 100 * run["seconds"]["dynamic_part"] / run["seconds"]["training_steps"]
    assert float(share[1]) == pytest.approx(expected, rel=0.1)
    for path in ("adapter", "ranks.jsonl", "ranks.png"):
        assert str(output / path) in table


def test_cut_texts_are_said_once_with_their_number(
    train: Train, output: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        split: [len(row["text"].split()) for row in read_lines(data / f"{split}.jsonl")]
        for split in ("train", "validation")
    }
    long = {split: sum(count + 2 > 8 for count in counts) for split, counts in words.items()}
    assert train("--method", "lora", "--data.max_length", 8, "--training.max_steps", 1) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert f"{long['train']} of 48 training and {long['validation']} of 16 validation" in notes[0]
    assert "data.max_length=8" in notes[0]
    assert read_json(output / "run.json")["texts_cut"] == long


def test_overwrite_replaces_a_run_and_leaves_other_files_alone(
    train: Train, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--training.max_steps", 1) == 0
    (output / "notes.txt").write_text("mine")
    assert train("--training.max_steps", 1, "--method", "lora", "--overwrite", "true") == 0
    assert (output / "notes.txt").read_text() == "mine"
    assert read_json(output / "run.json")["method"] == "lora"
    assert not (output / "ranks.jsonl").exists()


def test_a_square_bracket_in_a_path_is_printed_as_it_is(
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    odd = tmp_path / "a [bold] run"
    assert train("--output", odd, "--training.max_steps", 1) == 0
    assert str(odd / "adapter") in capsys.readouterr().out


def test_a_bug_of_ours_keeps_its_traceback(
    train: Train, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object, **named: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("dynlora.train.job.write_rank_map", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        train("--training.epochs", 1)
    run = read_json(output / "run.json")
    assert (run["status"], run["error"]) == ("failed", "ZeroDivisionError: a bug")


def test_a_run_that_another_process_has_begun_meanwhile_is_left_alone(
    train: Train,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def meanwhile(_: object) -> dict[str, float]:
        output.mkdir(parents=True)
        (output / "run.json").write_text("another's")
        return {}

    monkeypatch.setattr("dynlora.train.job._metrics_before", meanwhile)
    assert train() == 2
    assert "`output` must be a folder without a run" in capsys.readouterr().err
    assert (output / "run.json").read_text() == "another's"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_told_in_a_line_with_what_takes_less(
    train: Train,
    output: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("dynlora.train.job._save_model", full)
    assert train("--training.max_steps", 1) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("error: there must be enough memory, but got ")
    assert "--training.batch_size" in line
    assert read_json(output / "run.json")["status"] == "failed"


def test_a_decoder_without_padding_token_trains(tmp_path: Path, data: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.jobs import SPECIAL, WORDS, save_tokenizer

    folder = tmp_path / "llama"
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_labels=2,
        max_position_embeddings=32,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder, pad_token=None, eos_token="[SEP]")
    values = job_values(folder, data, tmp_path / "run")
    values["training"]["epochs"] = 1
    assert main(["train", str(write_job(tmp_path / "job.yaml", values))]) == 0
    assert read_json(tmp_path / "run" / "run.json")["status"] == "finished"


def test_training_learns_what_can_be_learned(train: Train, output: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "more", train=320, validation=64)
    options = ("--data.path", data, "--training.learning_rate", 0.02, "--training.epochs", 3)
    assert train(*options) == 0
    run = read_json(output / "run.json")
    assert run["metrics_before"]["accuracy"] < 0.65
    assert run["metrics_after"]["accuracy"] > 0.85
    assert run["metrics_after"]["loss"] < 0.75 * run["metrics_before"]["loss"]


def test_a_model_without_classifier_gets_the_same_new_one_whatever_the_method(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = save_model(tmp_path / "three", labels=3)
    losses = []
    for method in ("dynamic", "lora", "adalora", "full"):
        assert train("--model.path", three, "--method", method, "--dry-run", "--json") == 0
        losses.append(json.loads(capsys.readouterr().out)["metrics_before"]["loss"])
    assert losses == [losses[0]] * 4


@pytest.mark.parametrize("given", [None, "7"])
def test_kernels_are_kept_as_documented_unless_the_environment_says_otherwise(
    train: Train, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    if given is not None:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
    assert train("--dry-run") == 0
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == (given or "20000")
