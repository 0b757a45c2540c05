"""Image-text retrieval by the command line: learned, saved, evaluated, predicted and resumed."""

import io
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from dynlora.cli.main import main
from dynlora.importance.agreement import AgreementTest
from tests.cli.finished import assert_same_weights, facts, load_by_card, read_json, weights
from tests.jobs import MAX_POSITIONS, job_values, save_model, write_job, write_rows
from tests.towers import TOWERS, caption_rows, save_towers

TASK = "image_text_retrieval"
ROWS = 14


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return a folder with a model per kind, and a folder of data."""
    root = tmp_path_factory.mktemp("retrieval")
    for kind in TOWERS:
        save_towers(root / kind, kind)
    write_rows(root / "data" / "train.parquet", caption_rows(48, seed=1))
    write_rows(root / "data" / "validation.parquet", caption_rows(ROWS, seed=2))
    return root


def job_of(folders, folder, kind, data=None):
    values = job_values(folders / kind, data or folders / "data", folder / "run")
    values |= {"task": TASK, "data": values["data"] | {"text": "captions"}}
    values["training"] |= {"eval_batch_size": 4, "batch_size": 12}
    return write_job(folder / "job.yaml", values)


@pytest.fixture
def start(folders, tmp_path):
    def run(*options, kind="dual encoder"):
        job = job_of(folders, tmp_path, kind)
        return main(["train", str(job), *map(str, options)])

    return run


@pytest.fixture
def refused_task(folders, tmp_path, refused):
    def run(*options, kind="dual encoder", data=None):
        return refused("train", job_of(folders, tmp_path, kind, data), *options)

    return run


@pytest.fixture(scope="module", params=TOWERS)
def run(request, folders, tmp_path_factory):
    """Return a finished run whose ranks moved."""
    folder = tmp_path_factory.mktemp("run")
    job = job_of(folders, folder, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgreementTest, "is_significant", lambda self: True)
        quick = ("--training.epochs=6", "--training.eval=no", "--training.save=no")
        assert main(["train", str(job), *quick]) == 0
    return SimpleNamespace(folder=folder / "run", kind=request.param, base=folders / request.param)


@torch.no_grad()
def measured(run, data):
    """Return the metrics of the saved adapter on transformers' own model, by definition."""
    base = AutoModel.from_pretrained(run.base)
    model = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    processor = AutoImageProcessor.from_pretrained(run.base, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    images = [Image.open(io.BytesIO(row["image"])) for row in data]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    reads_padding = {"padding": "max_length", "max_length": 16}
    padding = reads_padding if run.kind == "SigLIP" else {"padding": True}

    def ask(texts, **more):
        tokens = tokenizer(list(texts), return_tensors="pt", **padding)
        tokens.pop("token_type_ids", None)
        return model(pixel_values=pixels, **tokens, **more)

    rounds = range(max(len(row["captions"]) for row in data))
    picked = [[row["captions"][n % len(row["captions"])] for row in data] for n in rounds]
    losses = [float(ask(texts, return_loss=True).loss) for texts in picked]
    owners = torch.tensor([n for n, row in enumerate(data) for _ in row["captions"]])
    logits = ask(text for row in data for text in row["captions"]).logits_per_image
    found = {"loss": sum(losses) / len(losses)}
    for k in (1, 5):
        rows = logits.T.topk(k).indices
        right = (rows == owners[:, None]).any(dim=1)
        found[f"text_to_image_recall_{k}"] = float(right.float().mean())
        rows = owners[logits.topk(k).indices]
        right = (rows == torch.arange(len(data))[:, None]).any(dim=1)
        found[f"image_to_text_recall_{k}"] = float(right.float().mean())
    return found


def test_both_towers_learn_and_stock_peft_finds_the_reported_metrics(run):
    values = facts(run.folder)
    assert values["metrics_after"]["loss"] < 0.9 * values["metrics_before"]["loss"]
    assert values["parameters"]["peak"] <= values["budget"]
    for tower in ("vision_model", "text_model"):
        ranks = {r for name, r in values["final_ranks"].items() if name.startswith(tower)}
        assert len(ranks) > 1, "this test is about ranks that moved"
    assert "vision_model.head.attention.out_proj" not in values["final_ranks"], "it has no effect"
    wanted = measured(run, caption_rows(ROWS, seed=2))
    assert values["metrics_after"] == pytest.approx(wanted, rel=1e-4)


def test_the_code_of_the_card_loads_the_adapter(run):
    loaded = load_by_card(run.folder / "adapter").state_dict()
    for name, value in weights(run.folder).items():
        if "lora_" in name:
            assert torch.equal(loaded[name.replace(".weight", ".default.weight")], value), name


def test_eval_repeats_the_metrics_of_the_run(run, folders, said):
    values = said("eval", run.folder)
    assert values["metrics"] == facts(run.folder)["metrics_after"]
    assert values["rows"] == ROWS


def test_predict_finds_the_same_captions_in_batches_of_any_size(run, folders, said):
    file = folders / "data" / "validation.parquet"
    alone, together = (
        said("predict", run.folder, file, "--batch-size", size)["predictions"] for size in (1, 5)
    )
    assert len(alone) == ROWS
    captions = [row["captions"] for row in caption_rows(ROWS, seed=2)]
    for one, other in zip(alone, together, strict=True):
        assert one["similarities"] == pytest.approx(other["similarities"], abs=2e-6)
        assert one["similarities"] == sorted(one["similarities"], reverse=True)
        assert len(one["prediction"]) == 5
    hits = [one["prediction"][0] in own for one, own in zip(alone, captions, strict=True)]
    assert sum(hits) / ROWS >= facts(run.folder)["metrics_after"]["image_to_text_recall_1"]


@pytest.mark.usefixtures("moving")
def test_a_run_is_resumed_inside_an_epoch_and_its_new_projections_are_saved(start, tmp_path):
    assert start("--training.epochs", 3) == 0
    config = read_json(tmp_path / "run" / "adapter" / "adapter_config.json")
    projections = ["visual_projection", "text_projection"]
    assert sorted(config["modules_to_save"]) == sorted(projections)
    saved = weights(tmp_path / "run")
    assert {f"base_model.model.{name}.weight" for name in projections} <= saved.keys()
    resume = ("--training.resume", tmp_path / "run" / "checkpoints" / "checkpoint-10")
    assert start("--training.epochs", 3, *resume, "--output", tmp_path / "again") == 0
    assert_same_weights(tmp_path / "run", tmp_path / "again")


def test_a_full_run_saves_a_model_with_both_processors(start, folders, tmp_path):
    assert start("--method", "full", "--training.learning_rate", 1e-3) == 0
    saved = tmp_path / "run" / "model"
    scales = [AutoModel.from_pretrained(p).logit_scale for p in (saved, folders / "dual encoder")]
    assert scales[0] != scales[1], "the logit scale is trained too"
    assert AutoTokenizer.from_pretrained(saved).model_max_length == MAX_POSITIONS
    assert AutoImageProcessor.from_pretrained(saved, backend="pil").size["height"] == 16


def test_rows_and_settings_without_right_negatives_are_refused(refused_task, tmp_path):
    rows = caption_rows(12)
    rows[7] |= {"image": rows[2]["image"]}
    write_rows(tmp_path / "data" / "train.parquet", rows)
    write_rows(tmp_path / "data" / "validation.parquet", caption_rows(8))
    told = "1 of 12 rows of the training split"
    message = refused_task(data=tmp_path / "data")
    assert told in message
    assert "the image of row 2 in row 7" in message
    assert "at least 2 with `task: image_text_retrieval`" in refused_task("--training.batch_size=1")
    message = refused_task("--data.text", "image")
    assert "must hold a caption, or a list of captions, in every row" in message


def test_a_model_with_one_tower_is_refused_by_name(refused_task, folders, tmp_path):
    texts = save_towers(tmp_path / "texts")
    save_model(texts)
    message = refused_task("--model.path", texts)
    assert "the BertModel of" in message
    assert "CLIP, SigLIP or a VisionTextDualEncoderModel" in message
