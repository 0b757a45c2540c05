"""`dynlora train` from end to end: every method, and the files and streams of a run."""

import json
import os
import shutil
from importlib.metadata import version
from itertools import pairwise

import pytest
import torch
import yaml
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from dynlora.cli.main import main
from dynlora.train.trainer import JobTrainer
from tests.cli.finished import (
    assert_same_weights,
    facts,
    finish,
    loss_on,
    read_json,
    read_lines,
    stock_model,
    weights,
)
from tests.jobs import SPECIAL, WORDS, missing, save_model, save_tokenizer, write_data

LAYERS = 13  # six in each of two blocks, and the pooler
COST = 12 * 32 - 4 * 32 + 4 * 48 + 32  # by layer: 4 of 16 + 16 and 2 of 16 + 32 a block; pooler
ADAPTER = "adapter/adapter_model.safetensors"


def test_a_dynamic_run_leaves_everything_that_was_promised(finished, model, data):
    assert {path.name for path in finished.iterdir()} == {
        "adapter", "checkpoints", "config.yaml", "metrics.jsonl", "ranks.jsonl", "ranks.png",
        "run.json",
    }  # fmt: skip
    assert (finished / "ranks.png").read_bytes().startswith(b"\x89PNG")
    kept = {path.name for path in (finished / "checkpoints").iterdir()}
    assert kept == {"checkpoint-10", "checkpoint-12"}
    run = facts(finished)
    assert (run["format"], run["dynlora"]) == (1, version("dynlora"))
    found = [run[key] for key in ("status", "method", "seed", "steps")]
    assert found == ["finished", "dynamic", 0, 12]
    assert torch.__version__.startswith(run["versions"]["torch"])  # some name no build
    assert run["budget"] == run["parameters"]["start"] == 2 * COST
    assert run["parameters"]["end"] <= run["parameters"]["peak"] <= 2 * COST
    for metrics in (run["metrics_before"], run["metrics_after"]):
        assert set(metrics) == {"loss", "accuracy", "f1", "matthews"}
    untrained = BertForSequenceClassification.from_pretrained(model).eval()
    assert run["metrics_before"]["loss"] == pytest.approx(loss_on(data, untrained, model), 1e-5)
    assert 0 < run["seconds"]["dynamic_part"] < run["seconds"]["training_steps"]
    assert run["seconds"]["evaluation"] > 0
    assert 10**8 < run["peak_memory_bytes"] < 10**11
    assert run["rows"] == {"train": 48, "validation": 16}
    assert set(run["machine"]) == {"platform", "cpus", "threads", "gpu"}
    assert min(run["machine"]["cpus"], run["machine"]["threads"]) >= 1


def test_each_event_is_a_line_with_step_and_figures_of_every_layer(finished):
    events = read_lines(finished / "ranks.jsonl")
    assert [event["step"] for event in events] == [3, 6, 9]
    for before, after in pairwise(events):
        for name, layer in after["layers"].items():
            assert layer["rank_before"] == before["layers"][name]["rank_after"]
    for event in events:
        assert len(event["layers"]) == LAYERS
        assert sum(layer["share"] for layer in event["layers"].values()) == pytest.approx(1)
        for layer in event["layers"].values():
            assert layer["score"] >= 0
            assert layer["weight"] == 1
            assert layer["effective_rank"] >= 1
            assert 0 <= layer["output_lost"] <= 0.1


def test_the_saved_patterns_are_exactly_the_live_ranks(finished):
    ranks = facts(finished)["final_ranks"]
    assert len(set(ranks.values())) > 1, "this test is about ranks that moved"
    last = read_lines(finished / "ranks.jsonl")[-1]
    assert ranks == {name: layer["rank_after"] for name, layer in last["layers"].items()}
    config = read_json(finished / "adapter" / "adapter_config.json")
    names = {
        rank: [name for name in ranks if ranks[name] == rank] for rank in {*ranks.values()} - {2}
    }
    escaped = {f"^({'|'.join(names[rank])})$".replace(".", r"\."): rank for rank in names}
    assert (config["peft_type"], config["rank_pattern"]) == ("LORA", escaped)
    assert config["alpha_pattern"] == {key: 2 * rank for key, rank in escaped.items()}
    tensors = weights(finished)
    for name, rank in ranks.items():
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
        assert tensors[f"base_model.model.{name}.lora_B.weight"].shape[1] == rank


# peft 0.21 reads AdaLoRA's masks as rank patterns too.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("method", ["dynamic", "lora", "adalora", "full"])
def test_stock_libraries_load_what_is_saved_and_find_the_reported_loss(
    finished_by, model, data, method
):
    loaded, run = stock_model(finished_by(method), model), facts(finished_by(method))
    assert loss_on(data, loaded, model) == pytest.approx(run["metrics_after"]["loss"], abs=1e-4)
    if method == "full":
        total = sum(parameter.numel() for parameter in loaded.parameters())
        assert run["parameters"] == {"start": total, "peak": total, "end": total}
        assert not (finished_by(method) / "adapter").exists()


def test_adalora_counts_live_directions_and_its_penalty_once_a_step(
    tmp_path, model, data, finished_by
):
    run, tensors = facts(finished_by("adalora")), weights(finished_by("adalora"))
    masks = read_json(finished_by("adalora") / "adapter" / "adapter_config.json")["rank_pattern"]
    live = 0
    for name, mask in masks.items():
        layer = "base_model.model." + name.removesuffix(".lora_E")
        features = tensors[f"{layer}.lora_A"].shape[1] + tensors[f"{layer}.lora_B"].shape[0]
        live += sum(mask) * (features + 1)
    assert run["parameters"]["end"] == live < run["parameters"]["start"]
    assert run["budget"] == run["parameters"]["start"] * 2 // 3, "rank 2 of an initial 3"
    untrained = BertForSequenceClassification.from_pretrained(model).eval()
    found = []
    for name, batch, accumulation in (("whole", 24, 1), ("parts", 4, 6)):
        options = (
            "--method=adalora", "--adalora.orth_reg_weight=100", "--training.learning_rate=1e-12",
            f"--training.batch_size={batch}", f"--training.gradient_accumulation={accumulation}",
            "--training.group_by_length=false", "--training.epochs=6",
        )  # fmt: skip
        lines = read_lines(finish(tmp_path / name, model, data, *options) / "metrics.jsonl")
        task_loss = loss_on(data, untrained, model)
        assert lines[0]["eval_loss"] == pytest.approx(task_loss, abs=1e-5), "without the penalty"
        found.append(next(line["loss"] for line in lines if "loss" in line))
    # A near-square random factor of rank 3 is at a distance of about 1.7 from orthogonal.
    assert found[0] > 10
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_uniform_importance_is_plain_lora_to_the_last_bit(train, output, finished_by):
    assert train("--dynamic.importance", "uniform", "--dynamic.fused", "false") == 0
    for name in (ADAPTER, "adapter/adapter_config.json"):
        assert (finished_by("lora") / name).read_bytes() == (output / name).read_bytes()


def test_an_automatic_budget_ends_small_and_its_search_leaves_no_evaluation(
    tmp_path, model, data, finished
):
    options = ("--dynamic.budget_end", "auto", "--dynamic.budget_tolerance", 1)
    run = finish(tmp_path, model, data, *options)
    assert facts(run)["parameters"]["end"] == COST  # every rank is 1
    assert read_lines(run / "ranks.jsonl")[-1]["step"] == 11
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert steps == [line["step"] for line in read_lines(finished / "metrics.jsonl")]


@pytest.mark.usefixtures("moving")
def test_the_resolved_configuration_gives_the_same_bytes_and_another_seed_others(
    tmp_path, finished
):
    resolved = finished / "config.yaml"
    values = yaml.safe_load(resolved.read_text())
    assert values["training"]["warmup_ratio"] == 0.06, "defaults are written out"
    for name, seed in (("same", "0"), ("other", "1")):
        options = ("--output", str(tmp_path / name), "--training.seed", seed)
        assert main(["train", str(resolved), *options]) == 0
    same = (finished / ADAPTER).read_bytes()
    assert (tmp_path / "same" / ADAPTER).read_bytes() == same
    assert (tmp_path / "other" / ADAPTER).read_bytes() != same
    assert (tmp_path / "same/ranks.jsonl").read_text() == (finished / "ranks.jsonl").read_text()


@pytest.mark.usefixtures("moving")
def test_when_a_run_evaluates_and_logs_changes_nothing_it_learns(train, tmp_path, finished):
    often = ("--training.eval", "steps", "--training.eval_steps", 1, "--training.logging_steps", 1)
    never = ("--training.eval", "no", "--training.save", "no", "--training.logging_steps", 50)
    assert train("--output", tmp_path / "often", *often) == 0
    assert train("--output", tmp_path / "never", "--training.eval_on_start", False, *never) == 0
    for name in ("often", "never"):
        assert_same_weights(finished, tmp_path / name)
    assert facts(tmp_path / "never")["metrics_before"] == {}
    assert main(["report", str(tmp_path / "never")]) == 0


@pytest.mark.usefixtures("moving")
def test_steps_do_not_follow_the_length_of_texts_and_the_first_have_the_longest(
    tmp_path, model, monkeypatch
):
    widths, train = [], JobTrainer.training_step

    def record(self, model, inputs, *more):
        widths.append(inputs["input_ids"].shape[1])
        return train(self, model, inputs, *more)

    monkeypatch.setattr(JobTrainer, "training_step", record)
    data = write_data(tmp_path / "rows", train=322)
    finish(tmp_path, model, data, "--training.batch_size=4", "--training.epochs=1", "--method=lora")
    lengths = [2 + len(row["text"].split()) for row in read_lines(data / "train.jsonl")]
    assert len(widths) == 81
    assert widths[:2] == sorted(lengths)[:-3:-1]
    changes = [after - before for before, after in pairwise(widths)]
    rises, falls = (sum(sign * change > 0 for change in changes) for sign in (1, -1))
    assert min(rises, falls) > 20, "sorted groups change only a few times"
    padding = 4 * sum(widths) - sum(lengths)
    assert padding < 0.1 * sum(lengths)


def test_the_best_checkpoint_is_what_is_saved_reported_and_evaluated(
    train, said, output, model, data
):
    assert train(
        "--training.load_best_model_at_end", "true", "--training.eval", "steps",
        "--training.eval_steps", 2, "--training.save_steps", 2, "--training.best_metric", "loss",
        "--training.save_total_limit", "null", "--training.learning_rate", 0.1,
    ) == 0  # fmt: skip
    evaluated = [line for line in read_lines(output / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 4, 6, 8, 10, 12]
    best = min(evaluated[1:], key=lambda line: line["eval_loss"])
    (told,) = [line for line in read_lines(output / "metrics.jsonl") if "best_loss" in line]
    run = facts(output)
    for loss in (told["best_loss"], run["metrics_after"]["loss"]):
        assert loss == pytest.approx(best["eval_loss"], abs=1e-6)
    assert run["best_checkpoint"].endswith(f"checkpoint-{best['step']}")
    loss = loss_on(data, stock_model(output, model), model)
    assert loss == pytest.approx(best["eval_loss"], abs=1e-5)
    assert said("eval", output)["metrics"] == run["metrics_after"]


@pytest.mark.usefixtures("moving")
def test_ranks_are_told_as_the_best_checkpoint_has_them(train, output, capfd):
    assert train(
        "--training.load_best_model_at_end", "true", "--training.eval", "steps",
        "--training.eval_steps", 2, "--training.save_steps", 2, "--training.best_metric", "f1",
        "--training.save_total_limit", "null", "--training.learning_rate", 1.0,
        "--dynamic.shrink_tolerance", 1.0, "--dynamic.hysteresis", 0.0, "--dynamic.events", 5,
        "--dynamic.first_event", 0.1,
    ) == 0  # fmt: skip
    printed, run, events = capfd.readouterr(), facts(output), read_lines(output / "ranks.jsonl")
    best = int(run["best_checkpoint"].rpartition("-")[2])
    moved = [
        any(layer["rank_before"] != layer["rank_after"] for layer in event["layers"].values())
        for event in events
        if event["step"] <= best
    ]
    assert 0 < len(moved) < len(events), "the best checkpoint lies between two events"
    assert ("ranks did not move" in printed.out) == (not any(moved))
    if any(moved):
        assert f"at {sum(moved)} of {len(moved)} events" in printed.out
    assert f"ranks are those of step {best} again" in printed.err
    ended = {name: layer["rank_after"] for name, layer in events[len(moved) - 1]["layers"].items()}
    assert run["final_ranks"] == ended


@pytest.mark.usefixtures("moving")
def test_the_output_is_the_table_alone_and_progress_goes_to_the_error_stream(
    train, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "a [bold] run"
    assert train("--output", output) == 0
    captured, run = capfd.readouterr(), facts(output)
    assert "\x1b" not in captured.out + captured.err
    assert "data: 48 training and 16 validation rows, 2 outputs" in captured.err
    assert f"method dynamic: {2 * COST:,} LoRA parameters, 34 others; 12 steps\n" in captured.err
    assert "step 0: validation accuracy" in captured.err
    assert "step 12/12: validation accuracy" in captured.err
    assert "note:" not in captured.err
    lines = [line for line in captured.err.splitlines() if "changed rank" in line]
    assert [line.split(":")[0] for line in lines] == [
        f"step {event['step']}" for event in read_lines(output / "ranks.jsonl")
    ]
    assert captured.err.count("ranks are final; they moved at ") == 1
    table = captured.out
    assert table.lstrip().startswith("dynlora train: method dynamic")
    for name in ("accuracy", "loss"):
        before, after = run["metrics_before"][name], run["metrics_after"][name]
        assert f"{before:.4f} → {after:.4f}" in table
    assert f"{run['parameters']['end']:,} of the budget of {2 * COST:,}" in table
    ranks = sorted(run["final_ranks"].values())
    paths = (str(output / name) for name in ("adapter", "ranks.jsonl", "ranks.png"))
    told = f"lowest {ranks[0]}, median {ranks[LAYERS // 2]}, highest {ranks[-1]}"
    moves = (f"2 → {ranks[-1]}", f"2 → {ranks[0]}")
    assert missing(table, told, *moves, "of it dynamic part", *paths) == []


def test_why_no_rank_moved_is_told_after_the_last_event(train, capfd):
    assert train() == 0
    lines = capfd.readouterr().err.splitlines()
    last = max(number for number, line in enumerate(lines) if "no rank changed" in line)
    assert lines[last + 1].startswith("note: no rank moved in ")
    assert "ranks are final" not in "".join(lines)


def test_quiet_and_json_leave_one_object_on_the_output(train, capfd):
    assert train("--method", "lora", "--training.max_steps", 1, "--quiet", "--json") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out)["after"].keys() == {"accuracy", "f1", "matthews", "loss"}


def test_a_run_is_replaced_only_by_overwrite_which_leaves_other_files_alone(
    train, error, output, finished
):
    shutil.copytree(finished, output)
    (output / "notes.txt").write_text("mine")
    assert main(["report", str(output)]) == 0
    told = "`--overwrite true` | `--training.resume latest`"
    assert missing(error("--method", "lora"), str(output), told) == []
    assert train("--training.max_steps", 1, "--method", "lora", "--overwrite", "true") == 0
    assert facts(output)["method"] == "lora"
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "ranks.jsonl").exists()
    assert not (output / "report.html").exists()


def test_a_bug_of_ours_keeps_its_traceback(train, output, monkeypatch):
    def broken(*given, **named):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("dynlora.train.job.write_rank_map", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        train("--training.max_steps", 1)
    run = facts(output)
    assert (run["status"], run["error"]) == ("failed", "ZeroDivisionError: a bug")


def test_a_run_that_another_process_has_begun_meanwhile_is_left_alone(
    train, output, monkeypatch, capsys
):
    def meanwhile(_):
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
    train, output, error, monkeypatch, capsys
):
    def full(*given, **named):
        raise error

    monkeypatch.setattr("dynlora.train.job._save_model", full)
    assert train("--method", "lora", "--training.max_steps", 1) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("error: there must be enough memory, but got ")
    assert "--training.batch_size" in line
    assert facts(output)["status"] == "failed"


def test_a_decoder_without_padding_token_trains(tmp_path, data):
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_labels=2,
        max_position_embeddings=32,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama", pad_token=None, eos_token="[SEP]")
    finish(tmp_path, tmp_path / "llama", data, "--training.max_steps", 2)


def test_a_model_without_classifier_gets_the_same_new_one_whatever_the_method(said, job, tmp_path):
    three = save_model(tmp_path / "three", labels=3)
    options = ("--model.path", three, "--dry-run", "--method")
    found = [
        said("train", job, *options, method)["metrics_before"]["loss"]
        for method in ("dynamic", "lora", "adalora", "full")
    ]
    assert found == [found[0]] * 4


@pytest.mark.parametrize("given", [None, "7"])
def test_kernels_and_freed_memory_are_kept_unless_the_environment_says_otherwise(
    error, monkeypatch, given
):
    kept = []
    monkeypatch.setattr("dynlora.train.job.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    if given is not None:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
    error("--data.path", "nowhere")
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == (given or "20000")
    assert kept == [True]


@pytest.mark.parametrize(
    ("processes", "gpus", "told"),
    [
        ("4", 0, "one process, got WORLD_SIZE='4' | torchrun or `--processes N` must start"),
        ("two", 0, "one process, got WORLD_SIZE='two'"),
        ("1", 2, "one GPU at most, got 2, | `dynlora train CONFIG --processes 2`"),
    ],
)
def test_processes_without_launcher_and_several_gpus_of_one_are_refused(
    error, monkeypatch, processes, gpus, told
):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert missing(error(), told) == []
