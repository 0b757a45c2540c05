"""Every task beside text classification: learned, saved, reloaded, evaluated and predicted."""

import io
import json
import shutil

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
from dynlora.importance.agreement import AgreementTest
from dynlora.train.config import METRICS
from tests.cli.finished import assert_same_weights, facts, read_json, read_lines, weights
from tests.jobs import (
    HIDDEN,
    WORDS,
    job_values,
    make_rows,
    missing,
    save_model,
    write_job,
    write_rows,
)
from tests.pictures import picture_rows, save_vit

IMAGES = "image_classification"
TASKS = ("regression", "multi_label", "embedding", "token_classification", IMAGES)
ROWS = 14
CLASSES = {
    "regression": (BertForSequenceClassification, 1),
    "multi_label": (BertForSequenceClassification, 3),
    "embedding": (BertModel, HIDDEN),
    "token_classification": (BertForTokenClassification, 3),
    IMAGES: (ViTForImageClassification, 2),
}


def rows_of(task, count, seed):
    if task == IMAGES:
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


def write_splits(folder, task, train, validation=None):
    """Write both splits of a task, by default of the same rows."""
    ending = ".parquet" if task == IMAGES else ".jsonl"
    write_rows(folder / f"train{ending}", train)
    write_rows(folder / f"validation{ending}", validation or train)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return a folder with a model for texts, one for images, and a folder of data per task."""
    root = tmp_path_factory.mktemp("tasks")
    save_model(root / "text")
    save_vit(root / "vision")
    for task in TASKS:
        write_splits(root / task, task, rows_of(task, 48, 1), rows_of(task, ROWS, 2))
    return root


def write_task(folders, folder, task, data=None, output=None):
    model = folders / ("vision" if task == IMAGES else "text")
    values = job_values(model, data or folders / task, output or folder / "run") | {"task": task}
    values["training"]["eval_batch_size"] = 4
    return write_job(folder / "job.yaml", values)


@pytest.fixture
def start(folders, tmp_path):
    def run(task, *options, data=None):
        job = write_task(folders, tmp_path, task, data)
        return main(["train", str(job), *map(str, options)])

    return run


@pytest.fixture
def refused_task(folders, tmp_path, refused):
    def run(task, *options, data=None):
        return refused("train", write_task(folders, tmp_path, task, data), *options)

    return run


@pytest.fixture(scope="module", params=TASKS)
def run(request, folders, tmp_path_factory):
    """Return a finished run of a task, of 24 steps, whose ranks moved."""
    folder = tmp_path_factory.mktemp(request.param)
    job = write_task(folders, folder, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgreementTest, "is_significant", lambda self: True)
        assert main(["train", str(job), "--training.epochs", "4", "--quiet"]) == 0
    return folder / "run"


def base_model(task, folders):
    kind, labels = CLASSES[task]
    place = folders / ("vision" if task == IMAGES else "text")
    return kind.from_pretrained(place, num_labels=labels, ignore_mismatched_sizes=True)


@torch.no_grad()
def losses_of(task, model, folders):
    """Return the loss of each label of the validation rows, one row at a time."""
    model.eval()
    if task == IMAGES:
        processor = AutoImageProcessor.from_pretrained(folders / "vision", backend="pil")
    else:
        processor = AutoTokenizer.from_pretrained(folders / "text")
    losses = []
    for row in rows_of(task, ROWS, 2):
        label = row["label"]
        if task == IMAGES:
            given = Image.open(io.BytesIO(row["image"]))
        else:  # each of the test's words is one token, between two special ones
            given = row["text"] if isinstance(row["text"], str) else " ".join(row["text"])
        output = model(**processor(given, return_tensors="pt"))
        if task == IMAGES:
            losses.append(float(cross_entropy(output.logits, torch.tensor([label]))))
        elif task == "token_classification":
            logits = output.logits[0, 1:-1]
            losses += cross_entropy(logits, torch.tensor(label), reduction="none").tolist()
        elif task == "embedding":
            mean = output.last_hidden_state[0].mean(dim=0)
            losses += (mean - torch.tensor(label)).square().tolist()
        elif task == "regression":
            losses.append(float((output.logits[0, 0] - label) ** 2))
        else:
            wanted = torch.tensor([float(place in label) for place in range(3)])
            logits = output.logits[0]
            losses += binary_cross_entropy_with_logits(logits, wanted, reduction="none").tolist()
    return losses


def test_a_task_is_learned_and_told_and_stock_peft_finds_the_reported_loss(run, folders):
    values = facts(run)
    task = values["task"]
    for metrics in (values["metrics_before"], values["metrics_after"]):
        assert set(metrics) == set(METRICS[task])
    after = values["metrics_after"]["loss"]
    assert after < 0.9 * values["metrics_before"]["loss"]
    assert values["parameters"]["peak"] <= values["budget"]
    assert len(set(values["final_ranks"].values())) > 1, "this test is about ranks that moved"
    loaded = PeftModel.from_pretrained(base_model(task, folders), run / "adapter")
    losses = losses_of(task, loaded, folders)
    assert after == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_eval_gives_the_numbers_that_the_run_ended_with(run, folders, said, capsys):
    task = facts(run)["task"]
    file = next((folders / task).glob("validation.*"))
    for options in ([], ["--data", file]):
        values = said("eval", run, *options)
        assert values["metrics"] == facts(run)["metrics_after"]
        assert list(values["metrics"]) == list(METRICS[task])
        assert values["rows"] == ROWS
    assert main(["eval", str(run)]) == 0
    figures = (f"{value:.4f}" for value in facts(run)["metrics_after"].values())
    assert missing(capsys.readouterr().out, *METRICS[task], *figures) == []


def close(one, other):
    if isinstance(one, float):
        return one == pytest.approx(other, abs=1e-4)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == other


def test_predict_says_something_of_each_row_whatever_its_batch(run, folders, said):
    file = next((folders / facts(run)["task"]).glob("validation.*"))
    alone, together = (
        said("predict", run, file, "--batch-size", size)["predictions"] for size in (1, 5)
    )
    assert len(alone) == len(together) == ROWS
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        assert "prediction" in one
        assert [key for key in one if not close(one[key], other[key])] == []


def test_a_merged_model_says_what_its_outputs_mean(run, tmp_path, said):
    said("export", run / "adapter", "--format", "merged", "--output", tmp_path / "made")
    problems = {"regression": "regression", "multi_label": "multi_label_classification"}
    found = read_json(tmp_path / "made" / "config.json").get("problem_type")
    assert found == problems.get(facts(run)["task"])


@pytest.mark.usefixtures("moving")
def test_a_vision_model_begins_with_eva_and_its_ranks_move_and_its_new_head_is_saved_and_resumed(
    start, folders, tmp_path
):
    output, eva = tmp_path / "run", "--lora.init_lora_weights=eva"
    assert start(IMAGES, eva, "--dynamic.shrink_tolerance=1") == 0
    run = facts(output)
    assert run["adapter_start_seconds"] > 0
    assert len(set(run["final_ranks"].values())) > 1
    assert run["parameters"]["peak"] <= run["budget"]
    for event in read_lines(output / "ranks.jsonl"):
        assert len(event["layers"]) == 12, "six linear layers in each of two blocks"
        for layer in event["layers"].values():
            # Five places: a class token and four patches of 8 x 8 pixels, over 48 pictures.
            assert layer["variance"] > 0
            assert layer["effective_rank"] > 1.5
    tensors = weights(output)
    assert not any("patch_embeddings" in name for name in tensors)
    heads = {name.rpartition(".")[2]: tensors[name] for name in tensors if "classifier" in name}
    assert set(heads) == {"weight", "bias"}
    untrained = base_model(IMAGES, folders).state_dict()
    for name, tensor in heads.items():
        assert not torch.equal(tensor, untrained[f"classifier.{name}"])
    config = read_json(output / "adapter" / "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == (None, ["classifier"])
    resume = ("--training.resume", output / "checkpoints" / "checkpoint-10")
    more = ("--dynamic.shrink_tolerance=1", "--output", tmp_path / "again")
    assert start(IMAGES, eva, *resume, *more) == 0
    assert_same_weights(output, tmp_path / "again")


@pytest.mark.parametrize("task", ["embedding", IMAGES])
def test_a_full_run_saves_a_model_with_all_that_it_needs(start, folders, tmp_path, task):
    assert start(task, "--method", "full", "--training.learning_rate", 1e-3) == 0
    saved = tmp_path / "run" / "model"
    losses = losses_of(task, CLASSES[task][0].from_pretrained(saved), folders)
    reported = facts(tmp_path / "run")["metrics_after"]["loss"]
    assert reported == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    if task == IMAGES:
        assert AutoImageProcessor.from_pretrained(saved, backend="pil").size["height"] == 16
    else:
        assert len(AutoTokenizer.from_pretrained(saved)) == len(WORDS) + 4


def test_a_new_regression_head_begins_at_the_mean_and_a_trained_one_is_kept(start, tmp_path):
    rows = [row | {"label": row["label"] + 50} for row in rows_of("regression", 48, 1)]
    data = write_splits(tmp_path / "data", "regression", rows)
    options = ("--method=full", "--training.learning_rate=1e-4", "--training.epochs=1")
    assert start("regression", *options, data=data) == 0
    run = facts(tmp_path / "run")
    assert run["metrics_before"]["rmse"] < 5, "it is 50 away from a head that says 0"
    trained = (tmp_path / "run" / "model").rename(tmp_path / "trained")
    away = [row | {"label": row["label"] + 50} for row in rows]
    data = write_splits(tmp_path / "away", "regression", away, rows)
    again = ("--model.path", trained, "--overwrite", "true")
    assert start("regression", *options, *again, data=data) == 0
    found = facts(tmp_path / "run")["metrics_before"]["rmse"]
    assert found == pytest.approx(run["metrics_after"]["rmse"], rel=1e-4)


def test_rows_without_any_class_are_told_or_refused(start, refused_task, tmp_path, capsys):
    rows = [row | {"label": []} for row in make_rows(12)]
    data = write_splits(tmp_path / "rows", "multi_label", rows)
    message = refused_task("multi_label", data=data)
    none = "holds no class in any of 12 rows of the"
    told = f"'label' {none} training split | `data.label` | `data.num_labels`"
    assert missing(message, told) == []
    options = ("--training.max_steps", 1, "--data.num_labels", 3, "--method", "lora")
    assert start("multi_label", *options, data=data) == 0
    told = f"{none} training split | {none} validation split"
    assert missing(capsys.readouterr().err, told) == []


@pytest.mark.parametrize(
    ("task", "change", "told"),
    [
        ("regression", {"label": None}, "finite float32 number in every row, but 1 of 48"),
        ("multi_label", {"label": [0, 99999]}, "lists of classes in [0, "),
        ("embedding", {"label": None}, "list of finite float32 numbers in every row, but 1 of 48"),
        ("embedding", {"label": [0.5]}, "lists of one length, 16 as in the first row, but 1 of 48"),
        ("token_classification", {"text": ["red"]}, "one class for each word in 'text', but 1 of"),
        (IMAGES, {"image": b"GIF89a no"}, "but 1 of 48 rows of the training split"),
    ],
)
def test_a_faulty_row_is_counted_and_named(refused_task, tmp_path, task, change, told):
    rows = rows_of(task, 48, 1)
    rows[7] |= change
    data = write_splits(tmp_path / "data", task, rows, rows_of(task, 8, 2))
    message = refused_task(task, data=data)
    assert told in message
    assert "row 7" in message or "rows 7" in message


def test_models_and_settings_of_another_task_are_refused(refused_task, folders, tmp_path):
    rows = [row | {"label": row["label"][:5]} for row in rows_of("embedding", 12, 1)]
    short = write_splits(tmp_path / "short", "embedding", rows)
    assert "vectors of 16 numbers, got 5" in refused_task("embedding", data=short)
    message = refused_task(IMAGES, "--model.path", folders / "text")
    assert missing(message, "could not be loaded", "image processor") == []
    message = refused_task("token_classification", "--model.path", folders / "vision")
    assert f"the tokenizer of {folders / 'vision'} could not be loaded" in message
    message = refused_task("regression", "--training.best_metric", "accuracy")
    assert "`task: regression`, one of pearson, spearman, rmse, loss, but got accuracy" in message
    wide = shutil.copytree(folders / "vision", tmp_path / "wide")
    size = {"size": {"height": 24, "width": 24}}
    path = wide / "preprocessor_config.json"
    path.write_text(json.dumps(read_json(path) | size))
    assert "must read what its processor makes of an image, but fails: " in refused_task(
        IMAGES, "--model.path", wide
    )
