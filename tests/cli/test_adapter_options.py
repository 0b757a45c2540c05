"""Continuing from an adapter, LoRA+, saved modules, presets and metrics of `dynlora train`."""

import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from dynlora import DynamicLoraConfig
from dynlora.train.config_file import read_job
from tests.adapters import change_config, save_classifier_adapter
from tests.cli.finished import (
    assert_last_steps_resume_exactly,
    assert_same_weights,
    facts,
    read_json,
    read_lines,
    run_job,
    weights,
)
from tests.jobs import job_values, missing, save_model

FILE = "adapter_model.safetensors"


def foreign_adapter(model, folder, *, labels=2, **lora):
    """Save an adapter of uneven ranks that PEFT made and something else trained."""
    patterns = {"bert.encoder.layer.0.attention.self.query": 5, ".*1.*value": 3}
    settings = {"r": 2, "lora_alpha": 6, "use_rslora": True, "rank_pattern": patterns}
    save_classifier_adapter(folder, model, labels=labels, **settings | lora)
    return folder


@pytest.fixture
def foreign(model, tmp_path):
    return foreign_adapter(model, tmp_path / "foreign")


def ranks_in(folder):
    tensors = load_file(folder / FILE)
    return {name: len(tensor) for name, tensor in tensors.items() if "lora_A" in name}


@pytest.mark.parametrize(("method", "r"), [("dynamic", 1), ("lora", 6)])
def test_a_job_goes_on_from_an_adapter_with_its_ranks_and_settings(
    train, output, foreign, capsys, method, r
):
    assert train("--method", method, "--lora.start_from", foreign, "--lora.r", r) == 0
    assert f"lora.r={r} has no effect" in capsys.readouterr().err
    before, after = load_file(foreign / FILE), weights(output)
    count = sum(t.numel() for name, t in before.items() if ".lora_" in name)
    assert facts(output)["parameters"]["start"] == count
    saved = read_json(output / "adapter" / "adapter_config.json")
    assert saved["use_rslora"] is True
    assert set(saved["target_modules"]) == {"query", "value", "dense"}
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert ranks_in(output / "adapter") == ranks_in(foreign)
    if method == "dynamic":
        # Chance would explain the scores of so few steps, so they count as missing.
        events = [event["layers"].values() for event in read_lines(output / "ranks.jsonl")]
        assert [{layer["score"] for layer in layers} for layers in events] == [{None}] * 3


@pytest.mark.usefixtures("moving")
def test_a_larger_r_grows_the_budget_of_the_adapter_and_ranks_move_within_it(
    train, output, foreign, model
):
    options = ("--lora.start_from", foreign, "--lora.r", 6, "--dynamic.shrink_tolerance", 1)
    assert train(*options) == 0
    events, tensors = read_lines(output / "ranks.jsonl"), load_file(foreign / FILE)
    costs = {
        name: tensor.shape[1] + len(tensors[name.replace("lora_A", "lora_B")])
        for name, tensor in tensors.items()
        if "lora_A" in name
    }
    begins = {name: layer["rank_before"] for name, layer in events[0]["layers"].items()}
    assert begins["bert.encoder.layer.0.attention.self.query"] == 5
    assert begins["bert.encoder.layer.1.attention.self.value"] == 3
    run, after = facts(output), ranks_in(output / "adapter")
    assert after != ranks_in(foreign)
    assert run["budget"] == 6 * sum(costs.values())
    assert run["parameters"]["peak"] <= run["budget"]
    spent = sum(costs[name] * rank for name, rank in after.items())
    assert 0 <= run["budget"] - spent < min(costs.values())
    base = BertForSequenceClassification.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, output / "adapter")
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) == spent
    assert_last_steps_resume_exactly(output)


def test_going_on_begins_at_the_loss_that_the_first_run_ended_with(train, output, finished):
    assert train("--lora.start_from", finished / "adapter", "--training.max_steps", 1) == 0
    first, second = facts(finished), facts(output)
    assert second["metrics_before"] == first["metrics_after"]
    assert second["parameters"]["start"] == first["parameters"]["end"]


def truncate(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100])


def put_nan(folder):
    broken = load_file(folder / FILE)
    next(iter(broken.values())).view(-1)[0] = float("nan")
    save_file(broken, folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("base", "lora", "spoil", "told"),
    [
        ({}, {}, shutil.rmtree, "adapter_config.json | foreign"),
        ({"hidden": 32}, {}, None, "bert.encoder.layer.0.attention | (16, 16) | (32, 32)"),
        ({"labels": 5}, {}, None, "number of labels | classifier | (5,"),
        ({}, {"task_type": None}, None, "the head 'classifier' too | --format merged"),
        ({}, {"use_dora": True}, None, "DoRA"),
        ({}, {}, truncate, FILE),
        ({}, {}, put_nan, "finite"),
    ],
    ids=["missing", "another model", "other labels", "no head", "DoRA", "truncated", "NaN"],
)
def test_an_adapter_to_continue_must_fit_and_be_whole(error, tmp_path, base, lora, spoil, told):
    model = save_model(tmp_path / "base", **base)
    folder = foreign_adapter(model, tmp_path / "foreign", labels=base.get("labels", 2), **lora)
    if spoil is not None:
        spoil(folder)
    assert missing(error("--lora.start_from", folder), told) == []


def test_an_adapter_that_was_of_another_task_and_fits_goes_on_as_one_of_this(
    train, output, foreign
):
    change_config(foreign, task_type="CAUSAL_LM")
    assert train("--lora.start_from", foreign, "--training.max_steps", 1) == 0
    assert read_json(output / "adapter" / "adapter_config.json")["task_type"] == "SEQ_CLS"
    assert any("classifier" in name for name in weights(output))


@pytest.mark.parametrize("method", ["adalora", "full"])
@pytest.mark.parametrize(
    ("key", "value"), [("lora.start_from", "somewhere"), ("training.loraplus_lr_ratio", 16)]
)
def test_what_only_lora_can_do_is_refused_elsewhere(error, method, key, value):
    message = error("--method", method, f"--{key}", value)
    assert missing(message, key, f"null with `method: {method}`") == []


@pytest.mark.usefixtures("moving")
def test_loraplus_trains_lora_b_at_its_own_rate(train, output, tmp_path, finished):
    """A ratio of 1 is the Trainer's own optimizer, also in its roundings."""
    assert train("--training.loraplus_lr_ratio", 16) == 0
    state = torch.load(output / "checkpoints" / "checkpoint-12" / "optimizer.pt", weights_only=True)
    assert {1e-2, 16e-2} <= {group["initial_lr"] for group in state["param_groups"]}
    equal = tmp_path / "equal"
    assert train("--output", equal, "--training.loraplus_lr_ratio", 1) == 0
    assert_same_weights(equal, finished)
    assert facts(output)["metrics_after"]["loss"] != facts(equal)["metrics_after"]["loss"]


def test_modules_to_save_are_saved_and_rslora_is_recorded(train, output, model):
    short = ("--training.max_steps", 2, "--lora.use_rslora", "true")
    assert train("--lora.modules_to_save", "[word_embeddings]", *short) == 0
    saved = weights(output)
    name = next(name for name in saved if "word_embeddings" in name)
    start = load_file(model / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert saved[name].shape == start.shape
    assert not torch.equal(saved[name], start)
    assert any("classifier" in name for name in saved), "the head is one in any case"
    others = sum(tensor.numel() for key, tensor in saved.items() if "lora_" not in key)
    assert facts(output)["other_parameters"] == others
    assert read_json(output / "adapter" / "adapter_config.json")["use_rslora"] is True
    assert yaml.safe_load((output / "config.yaml").read_text())["lora"]["use_rslora"] is True


def test_what_a_job_goes_on_from_is_not_overwritten(error, output):
    folder = output / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (output / "run.json").write_text("{}")
    message = error("--lora.start_from", folder, "--overwrite", "true")
    assert "`lora.start_from` must lie outside" in message


@pytest.mark.usefixtures("moving")
def test_the_papers_preset_is_written_out_and_moves_weights_and_ranks_to_the_end(
    tmp_path, model, data, output
):
    values = job_values(model, data, output) | {"dynamic": {"preset": "paper", "events": 6}}
    run_job(tmp_path, values, "--dynamic.shrink_tolerance", 1)
    expected = DynamicLoraConfig.from_preset("paper", events=6, shrink_tolerance=1)
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert written["dynamic"].keys() == set(expected.__slots__)
    assert read_job(output / "config.yaml").dynamic == expected
    found = read_lines(output / "ranks.jsonl")
    assert [event["step"] for event in found] == [1, 3, 5, 7, 9, 11]
    layers = found[-1]["layers"].values()
    assert len({layer["weight"] for layer in layers}) > 3
    assert len({layer["rank_after"] for layer in layers}) > 1
    # Shares are cost times score times variance, and nothing else: a rank costs 32 or 48.
    costs = [layer["share"] / (layer["score"] * layer["variance"]) for layer in layers]
    assert {round(cost / min(costs), 3) for cost in costs} == {1.0, 1.5}
    assert_last_steps_resume_exactly(output)


@pytest.mark.parametrize("metric", ["fisher", "magnitude", "attention_entropy"])
@pytest.mark.usefixtures("moving")
def test_every_metric_can_be_chosen(train, output, metric):
    assert train("--dynamic.importance", metric, "--training.max_steps", 6) == 0
    layers = read_lines(output / "ranks.jsonl")[-1]["layers"]
    scores = {name: layer["score"] for name, layer in layers.items()}
    assert len({score for score in scores.values() if score is not None}) > 1
    outside = {name for name, score in scores.items() if score is None}
    assert outside == ({"bert.pooler.dense"} if metric == "attention_entropy" else set())
