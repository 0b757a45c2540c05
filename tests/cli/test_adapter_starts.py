"""Variants of LoRA for comparison: DoRA, and adapters that begin otherwise, through the CLI."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from dynlora.cli.main import main
from tests.jobs import job_values, write_job
from tests.language import language_job, save_language_model, write_pairs
from tests.pictures import save_class_folders, save_vit

Train = Callable[..., int]
Error = Callable[..., str]

STARTS = ("gaussian", "orthogonal", "eva", "olora", "pissa", "pissa_niter_4")
DOUBLED = {"olora", "pissa", "pissa_niter_4"}
PISSA = ("--method", "lora", "--lora.init_lora_weights", "pissa")
LAYERS = 2 * (4 * (16 + 16) + 2 * (16 + 32)) + 16 + 16  # two blocks and the pooler, a rank each
OUTPUTS = 2 * (5 * 16 + 32) + 16


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def stock(model: Path, adapter: Path) -> Any:
    """Load as anyone would who has PEFT alone; the head comes with the adapter."""
    base = BertForSequenceClassification.from_pretrained(model)
    return PeftModel.from_pretrained(base, adapter).eval()


@torch.no_grad()
def validation_loss(model: Any, data: Path, folder: Path) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in rows])
    return float(torch.nn.functional.cross_entropy(model(**inputs).logits, labels))


@pytest.fixture(scope="module")
def plain_loss(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Return the validation loss before training of a job with PEFT's default start."""
    folder = tmp_path_factory.mktemp("plain")
    values = job_values(model, data, folder / "run") | {"method": "lora"}
    values["training"] |= {"max_steps": 1}
    assert main(["train", str(write_job(folder / "job.yaml", values))]) == 0
    return float(read_json(folder / "run" / "run.json")["metrics_before"]["loss"])


@pytest.mark.parametrize("start", STARTS)
def test_each_start_trains_and_saves_a_plain_adapter_of_the_original_model(
    train: Train, output: Path, model: Path, data: Path, start: str
) -> None:
    assert train("--method", "lora", "--lora.init_lora_weights", start) == 0
    run = read_json(output / "run.json")
    assert run["parameters"]["start"] == run["parameters"]["end"] == run["budget"] == 2 * LAYERS
    assert run["metrics_after"]["loss"] < run["metrics_before"]["loss"]
    saved = read_json(output / "adapter" / "adapter_config.json")
    assert saved["init_lora_weights"] is True
    assert saved["r"] == (4 if start in DOUBLED else 2)
    found = validation_loss(stock(model, output / "adapter"), data, model)
    assert found == pytest.approx(run["metrics_after"]["loss"], abs=1e-5)
    assert main(["eval", str(output), "--json"]) == 0


@pytest.mark.parametrize("start", STARTS)
def test_no_start_changes_the_models_outputs(
    train: Train, plain_loss: float, output: Path, start: str
) -> None:
    options = ("--lora.init_lora_weights", start, "--training.max_steps", 1)
    assert train("--method", "lora", *options) == 0
    run = read_json(output / "run.json")
    assert run["metrics_before"]["loss"] == pytest.approx(plain_loss, abs=1e-5)


@pytest.mark.parametrize(("start", "rslora"), [("pissa", "true"), ("eva", "false")])
def test_a_run_with_another_start_can_be_resumed_exactly(
    train: Train, output: Path, start: str, rslora: str
) -> None:
    given = ("--method", "lora", "--lora.init_lora_weights", start, "--lora.use_rslora", rslora)
    assert train(*given) == 0
    whole, facts = weights(output / "adapter"), read_json(output / "run.json")
    shutil.rmtree(output / "checkpoints" / "checkpoint-12")
    assert train(*given, "--training.resume", "latest") == 0
    again = weights(output / "adapter")
    assert again.keys() == whole.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, whole[name]), name
    resumed = read_json(output / "run.json")
    assert resumed["metrics_after"] == facts["metrics_after"]
    assert resumed["adapter_start_seconds"] == facts["adapter_start_seconds"] > 0


def test_the_best_checkpoint_of_another_start_is_what_is_saved(
    train: Train, output: Path, model: Path, data: Path
) -> None:
    best = ("--training.load_best_model_at_end", "true", "--training.save", "epoch")
    rate = ("--training.learning_rate", 1, "--training.epochs", 4)  # so it does not only get better
    metric = ("--training.best_metric", "loss")
    given = ("--method", "lora", "--lora.init_lora_weights", "pissa")
    assert train(*given, *best, *rate, *metric) == 0
    run = read_json(output / "run.json")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("eval_loss") for line in lines]
    assert run["metrics_after"]["loss"] == pytest.approx(
        min(loss for loss in losses[1:] if loss is not None), rel=1e-5
    )
    found = validation_loss(stock(model, output / "adapter"), data, model)
    assert found == pytest.approx(run["metrics_after"]["loss"], rel=1e-4)


def test_what_a_converted_adapter_holds_is_told_beside_what_was_trained(
    train: Train, output: Path
) -> None:
    assert train("--method", "lora", "--lora.init_lora_weights", "pissa") == 0
    assert read_json(output / "run.json")["parameters"] == {
        "start": 2 * LAYERS,
        "peak": 2 * LAYERS,
        "end": 2 * LAYERS,
        "saved": 4 * LAYERS,
    }
    held = weights(output / "adapter")
    assert sum(t.numel() for name, t in held.items() if ".lora_" in name) == 4 * LAYERS
    assert any("classifier" in name for name in held), "the head is saved too"


def test_time_to_find_a_start_counts_as_training(train: Train, output: Path) -> None:
    assert train("--method", "lora", "--lora.init_lora_weights", "eva") == 0
    run = read_json(output / "run.json")
    assert 0 < run["adapter_start_seconds"] < run["seconds"]["training_steps"]
    assert train("--method", "lora", "--overwrite", "true") == 0
    assert read_json(output / "run.json")["adapter_start_seconds"] == 0


def test_dora_trains_saves_and_reloads_with_its_lengths_counted(
    train: Train, output: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--method", "lora", "--lora.use_dora", "true") == 0
    run = read_json(output / "run.json")
    assert run["parameters"]["end"] == run["budget"] == 2 * LAYERS + OUTPUTS
    assert "saved" not in run["parameters"]
    held = weights(output / "adapter")
    assert sum(t.numel() for name, t in held.items() if ".lora_" in name) == 2 * LAYERS + OUTPUTS
    found = validation_loss(stock(model, output / "adapter"), data, model)
    assert found == pytest.approx(run["metrics_after"]["loss"], abs=1e-5)
    capsys.readouterr()
    assert main(["eval", str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["loss"] == pytest.approx(run["metrics_after"]["loss"], abs=1e-6)


def test_dora_can_be_resumed_exactly(train: Train, output: Path) -> None:
    given = ("--method", "lora", "--lora.use_dora", "true")
    assert train(*given) == 0
    whole = weights(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "checkpoint-12")
    assert train(*given, "--training.resume", "latest") == 0
    assert all(torch.equal(t, whole[name]) for name, t in weights(output / "adapter").items())


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva"])
@pytest.mark.usefixtures("moving")
def test_ranks_move_whatever_lora_a_begins_with(
    train: Train, output: Path, model: Path, data: Path, start: str
) -> None:
    assert train("--lora.init_lora_weights", start, "--dynamic.shrink_tolerance", 1) == 0
    run = read_json(output / "run.json")
    assert len(set(run["final_ranks"].values())) > 1
    assert run["parameters"]["peak"] <= run["budget"] == 2 * LAYERS
    found = validation_loss(stock(model, output / "adapter"), data, model)
    assert found == pytest.approx(run["metrics_after"]["loss"], abs=1e-5)


def test_lora_and_dynamic_begin_alike_with_eva(
    train: Train, tmp_path: Path, model: Path, data: Path
) -> None:
    found = []
    for method in ("lora", "dynamic"):
        values = job_values(model, data, tmp_path / method) | {"method": method}
        values["lora"] |= {"init_lora_weights": "eva"}
        values["dynamic"] |= {"importance": "uniform", "layer_weights": False, "fused": False}
        values["training"] |= {"epochs": 1}
        assert main(["train", str(write_job(tmp_path / f"{method}.yaml", values))]) == 0
        found.append(weights(tmp_path / method / "adapter"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--lora.use_dora", "true"), "`lora.use_dora` must be false with `method: dynamic`"),
        (
            ("--lora.init_lora_weights", "pissa"),
            "one of true, gaussian, orthogonal, eva with `method: dynamic`, but got pissa",
        ),
        (
            ("--method", "adalora", "--lora.init_lora_weights", "eva"),
            "`method: adalora`, but got eva",
        ),
        (("--method", "full", "--lora.use_dora", "true"), "`method: full`, but got true"),
        (("--lora.init_lora_weights", "false"), "got false, which starts with random"),
        (("--lora.init_lora_weights", "pisa"), "pisa"),
        (
            ("--method", "lora", "--lora.init_lora_weights", "orthogonal", "--lora.r", 3),
            "must be even with `lora.init_lora_weights: orthogonal`, but got 3. Use 4",
        ),
        (
            (*PISSA, "--lora.use_dora", "true"),
            "with `lora.use_dora: true`, but got pissa",
        ),
        (
            ("--method", "lora", "--lora.init_lora_weights", "olora", "--model.dtype", "bfloat16"),
            "float32 with `lora.init_lora_weights: olora`, but got bfloat16",
        ),
        (
            (*PISSA, "--model.quantization", "nf4"),
            "`model.quantization` must be null with `lora.init_lora_weights: pissa`, but got nf4",
        ),
        (
            (*PISSA, "--lora.r", 17),
            "at least lora.r=17 inputs and outputs, got 'bert.encoder.layer.0",
        ),
        (
            ("--method", "lora", "--lora.init_lora_weights", "eva", "--lora.r", 12),
            "needs inputs that vary in lora.r=12 directions",
        ),
    ],
)
def test_what_does_not_fit_together_is_told(
    error: Error, options: tuple[object, ...], told: str
) -> None:
    assert told in error(*options)


@pytest.mark.parametrize(
    "lora", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "eva"}, {"use_dora": True}]
)
def test_a_saved_adapter_of_a_language_model_is_as_good_as_what_was_trained(
    tmp_path: Path, output: Path, lora: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    llama = save_language_model(tmp_path / "llama")
    values = language_job(llama, write_pairs(tmp_path / "pairs"), output) | {"method": "lora"}
    values["lora"] = values["lora"] | lora
    assert main(["train", str(write_job(tmp_path / "text.yaml", values))]) == 0
    run = read_json(output / "run.json")
    assert run["metrics_after"]["loss"] < run["metrics_before"]["loss"]
    capsys.readouterr()
    assert main(["eval", str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["loss"] == pytest.approx(run["metrics_after"]["loss"], abs=1e-5)


def test_eva_knows_images_too(tmp_path: Path, output: Path) -> None:
    save_vit(tmp_path / "vit")
    save_class_folders(tmp_path / "pictures" / "train", 24)
    save_class_folders(tmp_path / "pictures" / "validation", 8)
    values = job_values(tmp_path / "vit", tmp_path / "pictures", output)
    values |= {"method": "lora", "task": "image_classification"}
    values["lora"] |= {"init_lora_weights": "eva"}
    assert main(["train", str(write_job(tmp_path / "image.yaml", values))]) == 0
    assert read_json(output / "run.json")["adapter_start_seconds"] > 0
