"""`dynlora train` on every task beside text classification: learned, saved, reloaded, reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ViTForImageClassification,
)

from dynlora.cli.main import main
from dynlora.train.config import METRICS
from tests.jobs import HIDDEN, WORDS, job_values, make_rows, save_model, write_job, write_rows
from tests.pictures import picture_rows, save_class_folders, save_vit

Start = Callable[..., int]
TASKS = ("regression", "multi_label", "embedding", "token_classification", "image_classification")


def rows_of(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows whose labels follow from their words, or from a picture's colour."""
    if task == "image_classification":
        return picture_rows(count, seed=seed)
    rows = make_rows(count, seed=seed)
    for row in rows:
        words = row["text"].split()
        numbers = [WORDS.index(word) for word in words]
        if task == "regression":
            row["label"] = sum(number < 4 for number in numbers) / 2 - 1
        elif task == "multi_label":
            row["label"] = sorted({number for number in numbers if number < 3})
        elif task == "embedding":
            row["label"] = [float(numbers.count(place)) for place in range(HIDDEN)]
        else:
            row |= {"text": words, "label": [min(number, 2) for number in numbers]}
    return rows


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model for texts, one for images, and a folder of data a task."""
    root = tmp_path_factory.mktemp("tasks")
    save_model(root / "text")
    save_vit(root / "vision")
    for task in TASKS:
        ending = ".parquet" if task == "image_classification" else ".jsonl"
        write_rows(root / task / f"train{ending}", rows_of(task, 48, 1))
        write_rows(root / task / f"validation{ending}", rows_of(task, 14, 2))
    return root


@pytest.fixture
def start(folders: Path, tmp_path: Path) -> Start:
    """Return a runner of a task's job of 12 steps; it returns the exit code."""

    def run(task: str, *options: object, data: Path | None = None) -> int:
        model = folders / ("vision" if task == "image_classification" else "text")
        values = job_values(model, data or folders / task, tmp_path / "run")
        values["task"] = task
        values["training"]["eval_batch_size"] = 4
        job = write_job(tmp_path / "job.yaml", values)
        return main(["train", str(job), *map(str, options)])

    return run


def run_json(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "run" / "run.json").read_text())


CLASSES = {
    "regression": (BertForSequenceClassification, 1),
    "multi_label": (BertForSequenceClassification, 3),
    "embedding": (BertModel, HIDDEN),
    "token_classification": (BertForTokenClassification, 3),
    "image_classification": (ViTForImageClassification, 2),
}


def base_model(task: str, folders: Path) -> torch.nn.Module:
    kind, labels = CLASSES[task]
    place = folders / ("vision" if task == "image_classification" else "text")
    return kind.from_pretrained(place, num_labels=labels, ignore_mismatched_sizes=True)


@torch.no_grad()
def losses_of(task: str, model: Any, folders: Path) -> list[float]:
    """Return the loss of each label of the validation rows, one row at a time."""
    model.eval()
    if task == "image_classification":
        processor = AutoImageProcessor.from_pretrained(folders / "vision", backend="pil")
        return [
            float(cross_entropy(model(**inputs).logits, torch.tensor([row["label"]])))
            for row in rows_of(task, 14, 2)
            for inputs in [processor(open_image(row["image"]), return_tensors="pt")]
        ]
    tokenizer = AutoTokenizer.from_pretrained(folders / "text")
    losses: list[float] = []
    for row in rows_of(task, 14, 2):
        text, label = row["text"], row["label"]
        if task == "token_classification":
            # Each of the test's words is one token, between two special ones.
            inputs = tokenizer(" ".join(text), return_tensors="pt")
            logits = model(**inputs).logits[0, 1:-1]
            losses += cross_entropy(logits, torch.tensor(label), reduction="none").tolist()
            continue
        if task == "embedding":
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            losses += (hidden.mean(dim=0) - torch.tensor(label)).square().tolist()
            continue
        output = model(**tokenizer(text, return_tensors="pt")).logits[0]
        if task == "regression":
            losses.append(float((output[0] - label) ** 2))
        else:
            wanted = torch.tensor([float(place in label) for place in range(3)])
            each = binary_cross_entropy_with_logits(output, wanted, reduction="none")
            losses += each.tolist()
    return losses


def open_image(content: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(content))


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(
    ("task", "method"), [*((task, "dynamic") for task in TASKS), ("embedding", "lora")]
)
def test_a_task_is_learned_and_told_and_stock_peft_finds_the_reported_loss(
    start: Start,
    folders: Path,
    tmp_path: Path,
    task: str,
    method: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert start(task, "--method", method, "--training.epochs", 4) == 0
    shown = capsys.readouterr().out
    assert all(metric in shown for metric in METRICS[task])
    run = run_json(tmp_path)
    assert run["task"] == task
    for metrics in (run["metrics_before"], run["metrics_after"]):
        assert set(metrics) == set(METRICS[task])
    assert run["metrics_after"]["loss"] < 0.9 * run["metrics_before"]["loss"]
    assert run["parameters"]["peak"] <= run["budget"]
    if method == "dynamic":
        assert len(set(run["final_ranks"].values())) > 1, "this test is about ranks that moved"
    loaded = PeftModel.from_pretrained(base_model(task, folders), tmp_path / "run" / "adapter")
    losses = losses_of(task, loaded, folders)
    assert run["metrics_after"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_new_regression_head_begins_at_the_mean_and_a_trained_one_is_kept(
    start: Start, tmp_path: Path
) -> None:
    rows = [row | {"label": row["label"] + 50} for row in rows_of("regression", 48, 1)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    options = ("--method", "full", "--training.learning_rate", "1e-4", "--training.epochs", "1")
    assert start("regression", *options, data=tmp_path / "data") == 0
    run = run_json(tmp_path)
    assert run["metrics_before"]["rmse"] < 5, "it is 50 away from a head that says 0"
    trained = (tmp_path / "run" / "model").rename(tmp_path / "trained")
    away = [row | {"label": row["label"] + 50} for row in rows]
    write_rows(tmp_path / "away" / "train.jsonl", away)
    write_rows(tmp_path / "away" / "validation.jsonl", rows)
    again = (*options, "--model.path", trained, "--overwrite", "true")
    assert start("regression", *again, data=tmp_path / "away") == 0
    found = run_json(tmp_path)["metrics_before"]["rmse"]
    assert found == pytest.approx(run["metrics_after"]["rmse"], rel=1e-4)


def test_the_best_checkpoint_is_kept_by_a_metric_of_which_lower_is_better(
    start: Start, tmp_path: Path
) -> None:
    options = ("--training.load_best_model_at_end", "true", "--training.save", "epoch")
    assert start("regression", *options, "--training.best_metric", "rmse") == 0
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line["eval_rmse"] for line in lines if "eval_rmse" in line][1:3]
    assert run_json(tmp_path)["metrics_after"]["rmse"] == pytest.approx(min(epochs))


@pytest.mark.parametrize("task", ["embedding", "image_classification"])
def test_a_full_run_saves_a_model_with_all_that_it_needs(
    start: Start, folders: Path, tmp_path: Path, task: str
) -> None:
    assert start(task, "--method", "full", "--training.learning_rate", 1e-3) == 0
    saved = tmp_path / "run" / "model"
    model = CLASSES[task][0].from_pretrained(saved)
    losses = losses_of(task, model, folders)
    reported = run_json(tmp_path)["metrics_after"]["loss"]
    assert reported == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    if task == "image_classification":
        assert AutoImageProcessor.from_pretrained(saved, backend="pil").size["height"] == 16
    else:
        assert len(AutoTokenizer.from_pretrained(saved)) == len(WORDS) + 4


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(start: Start, tmp_path: Path) -> None:
    task = "image_classification"
    assert start(task, "--output", tmp_path / "whole") == 0
    whole = adapter(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-10"
    assert start(task, "--training.resume", checkpoint) == 0
    again = adapter(tmp_path / "run")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.usefixtures("moving")
def test_a_vision_models_features_are_seen_and_its_new_head_is_saved_whole(
    start: Start, folders: Path, tmp_path: Path
) -> None:
    assert start("image_classification", "--lora.target_modules", "all-linear") == 0
    lines = (tmp_path / "run" / "ranks.jsonl").read_text().splitlines()
    for event in map(json.loads, lines):
        assert len(event["layers"]) == 12, "six linear layers in each of two blocks"
        for layer in event["layers"].values():
            # Five places: a class token and four patches of 8 x 8 pixels, over 48 pictures.
            assert layer["variance"] > 0
            assert layer["effective_rank"] > 1.5
    tensors = adapter(tmp_path / "run")
    assert not any("patch_embeddings" in name for name in tensors)
    heads = {name: tensors[name] for name in tensors if "classifier" in name}
    assert {name.rpartition(".")[2] for name in heads} == {"weight", "bias"}
    untrained = base_model("image_classification", folders).state_dict()
    for name, tensor in heads.items():
        assert not torch.equal(tensor, untrained[f"classifier.{name.rpartition('.')[2]}"])
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] is None
    assert config["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize("kind", ["folders", "npz", "csv"])
def test_images_come_as_folders_arrays_and_paths_too(
    start: Start, tmp_path: Path, kind: str
) -> None:
    data = tmp_path / "data"
    for split, count in (("train", 24), ("validation", 8)):
        save_class_folders(data / split, count)
    if kind == "csv":
        for split in ("train", "validation"):
            files = sorted((data / split).rglob("*.jpg"))
            rows = [
                {"image": str(file.relative_to(data)), "label": int(file.parent.name == "bees")}
                for file in files
            ]
            write_rows(tmp_path / "data" / f"{split}-list.csv", rows)
        options = ["--data.train_split", "train-list", "--data.validation_split", "validation-list"]
        assert start("image_classification", *options, data=data) == 0
    elif kind == "npz":
        files = sorted((data / "train").rglob("*.jpg"))
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        labels = np.array([file.parent.name == "bees" for file in files], dtype=np.uint8)
        np.savez(data / "all.npz", x=images, y=labels)
        options = ["--data.validation_fraction", "0.25"]
        assert start("image_classification", *options, data=data / "all.npz") == 0
    else:
        assert start("image_classification", data=data) == 0
    rows = {"train": 18, "validation": 6} if kind == "npz" else {"train": 24, "validation": 8}
    assert run_json(tmp_path)["rows"] == rows
    after, before = run_json(tmp_path)["metrics_after"], run_json(tmp_path)["metrics_before"]
    assert after["loss"] < before["loss"]


@pytest.fixture
def refused(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a runner of jobs that must fail before anything is written; it returns the error."""

    def run(task: str, *options: object, data: Path | None = None) -> str:
        assert start(task, *options, data=data) == 2
        assert not (tmp_path / "run").exists()
        lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error:")]
        (line,) = lines
        return line

    return run


@pytest.mark.parametrize(
    ("task", "change", "told"),
    [
        ("regression", {"label": None}, "finite number in every row, but 1 of 48"),
        ("multi_label", {"label": [0, 99999]}, "lists of classes in [0, "),
        ("embedding", {"label": None}, "list of finite numbers in every row, but 1 of 48"),
        ("embedding", {"label": [0.5]}, "lists of one length, 16 as in the first row, but 1 of 48"),
        ("token_classification", {"text": ["red"]}, "one class for each word in 'text', but 1 of"),
        ("image_classification", {"image": b"GIF89a no"}, "but 1 of 48 rows of the training split"),
    ],
)
def test_a_faulty_row_is_counted_and_named(
    refused: Callable[..., str], tmp_path: Path, task: str, change: dict[str, Any], told: str
) -> None:
    ending = ".parquet" if task == "image_classification" else ".jsonl"
    rows = rows_of(task, 48, 1)
    rows[7] |= change
    write_rows(tmp_path / "data" / f"train{ending}", rows)
    write_rows(tmp_path / "data" / f"validation{ending}", rows_of(task, 8, 2))
    message = refused(task, data=tmp_path / "data")
    assert told in message
    assert "row 7" in message or "rows 7" in message


def test_vectors_must_be_as_long_as_the_hidden_size(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        rows = [row | {"label": row["label"][:5]} for row in rows_of("embedding", 12, 1)]
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    told = refused("embedding", data=tmp_path / "data")
    assert "vectors of 16 numbers, got 5" in told


def test_a_model_without_an_image_processor_is_refused(
    refused: Callable[..., str], folders: Path
) -> None:
    message = refused("image_classification", "--model.path", folders / "text")
    assert "could not be loaded" in message
    assert "image processor" in message


def test_a_text_model_in_another_tasks_place_is_refused(
    refused: Callable[..., str], folders: Path
) -> None:
    message = refused("token_classification", "--model.path", folders / "vision")
    assert f"the tokenizer of {folders / 'vision'} could not be loaded" in message


def test_a_best_metric_of_another_task_is_refused(refused: Callable[..., str]) -> None:
    message = refused("regression", "--training.best_metric", "accuracy")
    assert "`task: regression`, one of pearson, spearman, rmse, loss, but got accuracy" in message
