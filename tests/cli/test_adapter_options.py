"""What a job can say of its adapter: going on from one, LoRA+, early stopping, saved modules."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from tests.jobs import save_model

Train = Callable[..., int]
Error = Callable[..., str]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def foreign_adapter(model: Path, folder: Path, **lora: Any) -> Path:
    """Save an adapter of uneven ranks that PEFT made and something else trained."""
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["query", "value", "dense"],
        "rank_pattern": {"bert.encoder.layer.0.attention.self.query": 5, ".*1.*value": 3},
        "task_type": "SEQ_CLS",
    } | lora
    base = BertForSequenceClassification.from_pretrained(model)
    peft_model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft_model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "dynamic"])
def test_a_job_goes_on_from_an_adapter_where_it_was_left(
    train: Train, output: Path, tmp_path: Path, model: Path, method: str
) -> None:
    folder = foreign_adapter(model, tmp_path / "foreign")
    assert train("--method", method, "--lora.start_from", folder) == 0
    run = read_json(output / "run.json")

    torch.manual_seed(0)
    base = BertForSequenceClassification.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    tokens = torch.randint(4, 12, (3, 8))
    with torch.no_grad():
        assert not torch.equal(loaded(tokens).logits, loaded.get_base_model()(tokens).logits * 0)
    count = sum(t.numel() for name, t in weights(folder).items() if ".lora_" in name)
    assert run["parameters"]["start"] == count
    saved = read_json(output / "adapter" / "adapter_config.json")
    assert saved["use_rslora"] is True
    assert set(saved["target_modules"]) == {"query", "value", "dense"}
    before, after = weights(folder), weights(output / "adapter")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before if before[
        name
    ].shape == after[name].shape)  # fmt: skip


def ranks_in(folder: Path) -> dict[str, int]:
    return {name: len(tensor) for name, tensor in weights(folder).items() if "lora_A" in name}


def test_a_job_whose_scores_are_missing_keeps_the_ranks_of_the_adapter_that_it_goes_on_from(
    train: Train, output: Path, tmp_path: Path, model: Path
) -> None:
    folder = foreign_adapter(model, tmp_path / "foreign")
    assert train("--lora.start_from", folder) == 0
    events = [json.loads(line) for line in (output / "ranks.jsonl").read_text().splitlines()]
    assert len(events) == 3
    assert {layer["score"] for event in events for layer in event["layers"].values()} == {None}
    assert ranks_in(output / "adapter") == ranks_in(folder)


def test_a_larger_r_grows_the_budget_of_the_adapter_that_a_job_goes_on_from(
    train: Train, output: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign_adapter(model, tmp_path / "foreign")
    assert train("--lora.start_from", folder, "--lora.r", 6) == 0
    assert "lora.r=6 is above the r=2 of the adapter in lora.start_from" in capsys.readouterr().err
    before, after = ranks_in(folder), ranks_in(output / "adapter")
    assert all(after[name] >= before[name] for name in before)
    run = read_json(output / "run.json")
    costs = {
        name: tensor.shape[1] + len(weights(folder)[name.replace("lora_A", "lora_B")])
        for name, tensor in weights(folder).items()
        if "lora_A" in name
    }
    assert run["budget"] == 6 * sum(costs.values())
    spent = sum(costs[name] * rank for name, rank in after.items())
    assert 0 <= run["budget"] - spent < min(costs.values())
    torch.manual_seed(0)
    base = BertForSequenceClassification.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, output / "adapter")
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) == spent
    whole = weights(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "checkpoint-12")
    options = ("--lora.start_from", folder, "--lora.r", 6, "--training.resume", "latest")
    assert train(*options) == 0
    assert all(torch.equal(t, whole[n]) for n, t in weights(output / "adapter").items())


@pytest.mark.parametrize(("method", "r"), [("dynamic", 1), ("lora", 1), ("lora", 6)])
def test_an_r_without_effect_on_the_adapter_that_a_job_goes_on_from_is_told(
    train: Train,
    output: Path,
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    r: int,
) -> None:
    folder = foreign_adapter(model, tmp_path / "foreign")
    assert train("--method", method, "--lora.start_from", folder, "--lora.r", r) == 0
    assert f"lora.r={r} has no effect" in capsys.readouterr().err
    assert ranks_in(output / "adapter") == ranks_in(folder)


def test_going_on_begins_at_the_loss_that_the_first_run_ended_with(
    train: Train, output: Path, tmp_path: Path
) -> None:
    assert train() == 0
    first = read_json(output / "run.json")
    again = tmp_path / "again"
    assert train("--output", again, "--lora.start_from", output / "adapter") == 0
    second = read_json(again / "run.json")
    assert second["metrics_before"] == first["metrics_after"]
    assert second["parameters"]["start"] == first["parameters"]["end"]


def test_a_run_that_went_on_can_be_resumed_exactly(
    train: Train, output: Path, tmp_path: Path, model: Path
) -> None:
    folder = foreign_adapter(model, tmp_path / "foreign")
    assert train("--lora.start_from", folder) == 0
    whole = weights(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "checkpoint-12")
    assert train("--lora.start_from", folder, "--training.resume", "latest") == 0
    for name, tensor in weights(output / "adapter").items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.usefixtures("moving")
def test_ranks_of_an_adapter_that_is_gone_on_from_move_within_what_it_holds(
    train: Train, output: Path, tmp_path: Path, model: Path
) -> None:
    folder = foreign_adapter(model, tmp_path / "foreign")
    assert train("--lora.start_from", folder, "--dynamic.shrink_tolerance", 1) == 0
    run = read_json(output / "run.json")
    assert run["parameters"]["peak"] <= run["budget"]
    events = [json.loads(line) for line in (output / "ranks.jsonl").read_text().splitlines()]
    begins = {name: layer["rank_before"] for name, layer in events[0]["layers"].items()}
    assert begins["bert.encoder.layer.0.attention.self.query"] == 5
    assert begins["bert.encoder.layer.1.attention.self.value"] == 3
    assert any(
        layer["rank_before"] != layer["rank_after"]
        for event in events
        for layer in event["layers"].values()
    )


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def put_nan(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    broken = load_file(file)
    next(iter(broken.values())).view(-1)[0] = float("nan")
    save_file(broken, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("base", "lora", "spoil", "told"),
    [
        ({}, {}, shutil.rmtree, ["adapter_config.json", "foreign"]),
        ({"hidden": 32}, {}, None, ["bert.encoder.layer.0.attention", "(16, 16)", "(32, 32)"]),
        ({"labels": 5}, {}, None, ["number of labels", "classifier", "(5,"]),
        ({}, {"task_type": None}, None, ["the head 'classifier' too", "--format merged"]),
        ({}, {"use_dora": True}, None, ["DoRA"]),
        ({}, {}, truncate, ["adapter_model.safetensors"]),
        ({}, {}, put_nan, ["finite"]),
    ],
    ids=["missing", "another model", "other labels", "no head", "DoRA", "truncated", "NaN"],
)
def test_an_adapter_to_continue_must_fit_and_be_whole(
    error: Error,
    tmp_path: Path,
    base: dict[str, int],
    lora: dict[str, Any],
    spoil: Callable[[Path], None] | None,
    told: list[str],
) -> None:
    folder = foreign_adapter(save_model(tmp_path / "base", **base), tmp_path / "foreign", **lora)
    if spoil is not None:
        spoil(folder)
    message = error("--lora.start_from", folder)
    for part in told:
        assert part in message


def test_an_adapter_that_was_of_another_task_and_fits_goes_on_as_one_of_this(
    train: Train, output: Path, tmp_path: Path, model: Path
) -> None:
    folder = foreign_adapter(model, tmp_path / "foreign")
    config = read_json(folder / "adapter_config.json") | {"task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert train("--lora.start_from", folder, "--training.epochs", 1) == 0
    assert read_json(output / "adapter" / "adapter_config.json")["task_type"] == "SEQ_CLS"
    assert any("classifier" in name for name in weights(output / "adapter"))


@pytest.mark.parametrize("method", ["adalora", "full"])
@pytest.mark.parametrize(
    ("key", "value"), [("lora.start_from", "somewhere"), ("training.loraplus_lr_ratio", "16")]
)
def test_what_only_lora_can_do_is_refused_elsewhere(
    error: Error,
    method: str,
    key: str,
    value: str,
) -> None:
    told = error("--method", method, f"--{key}", value)
    assert key in told
    assert f"null with `method: {method}`" in told


@pytest.mark.parametrize("method", ["lora", "dynamic"])
@pytest.mark.usefixtures("moving")
def test_loraplus_trains_lora_b_at_its_own_rate(
    train: Train, output: Path, tmp_path: Path, method: str
) -> None:
    assert train("--method", method, "--training.loraplus_lr_ratio", 16) == 0
    state = torch.load(output / "checkpoints" / "checkpoint-12" / "optimizer.pt", weights_only=True)
    rates = {group["initial_lr"] for group in state["param_groups"]}
    assert {1e-2, 16e-2} <= rates
    plain = tmp_path / "plain"
    assert train("--output", plain, "--method", method, "--training.loraplus_lr_ratio", 1) == 0
    losses = {
        folder: read_json(folder / "run.json")["metrics_after"]["loss"]
        for folder in (output, plain)
    }
    assert losses[output] != losses[plain]


@pytest.mark.usefixtures("moving")
def test_loraplus_with_one_rate_for_both_factors_is_the_trainers_own_optimizer(
    train: Train, output: Path, tmp_path: Path
) -> None:
    """Also in its roundings: it runs the same kernel, which is several times as fast as a loop."""
    assert train("--training.loraplus_lr_ratio", 1) == 0
    plain = tmp_path / "plain"
    assert train("--output", plain) == 0
    weights = [
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (output, plain)
    ]
    assert weights[0] == weights[1]


def test_early_stopping_ends_a_run_that_gets_no_better(train: Train, output: Path) -> None:
    options = {
        "learning_rate": 1e-12,  # nothing can get better
        "epochs": 8,
        "early_stopping_patience": 2,
        "best_metric": "loss",
        "save": "epoch",
        "load_best_model_at_end": "true",
    }
    given = [word for key, value in options.items() for word in (f"--training.{key}", value)]
    assert train(*given) == 0
    run = read_json(output / "run.json")
    assert run["status"] == "finished"
    assert run["steps"] < 8 * 6
    steps = run["steps"]
    best = int(run["best_checkpoint"].rpartition("-")[2])
    assert steps == best + 2 * 6


def test_early_stopping_needs_evaluations(error: Error) -> None:
    told = error("--training.early_stopping_patience", 2, "--training.eval", "no")
    assert "`training.eval`" in told
    assert "early_stopping_patience" in told


@pytest.mark.parametrize("behind", [0, 6], ids=["where it stopped", "an epoch before"])
def test_a_run_that_stopped_early_stops_there_when_resumed(
    train: Train, output: Path, behind: int
) -> None:
    options = ["--training.learning_rate", 1e-12, "--training.epochs", 8, "--training.save"]
    options += ["epoch", "--training.early_stopping_patience", 3, "--training.best_metric", "loss"]
    options += ["--training.save_total_limit", "null"]
    assert train(*options) == 0
    first, whole = read_json(output / "run.json"), weights(output / "adapter")
    for folder in (output / "checkpoints").iterdir():
        if int(folder.name.rpartition("-")[2]) > first["steps"] - behind:
            shutil.rmtree(folder)
    assert train(*options, "--training.resume", "latest") == 0
    again = read_json(output / "run.json")
    assert (again["steps"], again["metrics_after"]) == (first["steps"], first["metrics_after"])
    for name, tensor in weights(output / "adapter").items():
        assert torch.equal(tensor, whole[name]), name


def test_modules_to_save_are_trained_and_saved(train: Train, output: Path, model: Path) -> None:
    assert train("--lora.modules_to_save", "[word_embeddings]") == 0
    saved = weights(output / "adapter")
    name = next(name for name in saved if "word_embeddings" in name)
    start = load_file(model / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert saved[name].shape == start.shape
    assert not torch.equal(saved[name], start)
    assert any("classifier" in name for name in saved), "the head is one in any case"


def test_rslora_divides_by_the_root_of_the_rank(train: Train, output: Path) -> None:
    assert train("--lora.use_rslora", "true") == 0
    assert read_json(output / "adapter" / "adapter_config.json")["use_rslora"] is True
    assert yaml.safe_load((output / "config.yaml").read_text())["lora"]["use_rslora"] is True


def test_what_a_job_goes_on_from_is_not_overwritten(error: Error, output: Path) -> None:
    folder = output / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (output / "run.json").write_text("{}")
    told = error("--lora.start_from", folder, "--overwrite", "true")
    assert "`lora.start_from` must lie outside" in told


def test_adaloras_penalty_counts_once_a_step_whatever_is_accumulated(
    train: Train, output: Path, tmp_path: Path
) -> None:
    losses = []
    for name, batch, accumulation in (("whole", 24, 1), ("parts", 4, 6)):
        options = {
            "--output": tmp_path / name,
            "--method": "adalora",
            "--adalora.orth_reg_weight": 100,
            "--training.learning_rate": 1e-12,
            "--training.batch_size": batch,
            "--training.gradient_accumulation": accumulation,
            "--training.group_by_length": "false",
            "--training.epochs": 6,
        }
        assert train(*(word for pair in options.items() for word in pair)) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append(next(line["loss"] for line in map(json.loads, lines) if "loss" in line))
    assert losses[0] > 10
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
