"""Captions and answers by the command line: learned, saved, evaluated, predicted and resumed."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

from dynlora.cli.main import main
from dynlora.importance.agreement import AgreementTest
from tests.cli.finished import assert_same_weights, facts, read_json, weights
from tests.jobs import job_values, write_job, write_rows
from tests.language import save_language_model
from tests.pictures import encoded
from tests.towers import caption_rows, scene
from tests.vision_language import KINDS, PROJECTOR, save_vision_language

TASK = "image_text_to_text"
ANSWERS = {"prompt": "ask", "completion": "tell"}
REQUESTS = {"joined": "<image>\n", "chat": "<turn>user\n<image>{}<end>\n<turn>assistant\n"}
ENDS = {"joined": "<eos>", "chat": "<end>\n<eos>"}


def make_rows(count, *, seed):
    """Return rows with images of two shapes, one to three captions, a question and its answer."""
    rows = caption_rows(count, seed=seed)
    for number, row in enumerate(rows):
        if number % 4 == 0:
            row["image"] = encoded(scene(number % 6, seed).resize((16, 8)))
        row |= {"ask": row["captions"][0].split()[1], "tell": row["captions"][0].split()[0]}
    return rows


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return a folder with a model per kind, and a folder of data."""
    root = tmp_path_factory.mktemp("vision_language")
    for kind in KINDS:
        save_vision_language(root / kind, kind)
    write_rows(root / "data" / "train.parquet", make_rows(24, seed=1))
    write_rows(root / "data" / "validation.parquet", make_rows(8, seed=2))
    return root


def job_of(folders, folder, kind, data=None):
    values = job_values(folders / kind, data or folders / "data", folder / "run")
    named = {"text": "captions"} if kind == "joined" else ANSWERS
    values |= {"task": TASK, "data": values["data"] | named}
    values["data"] |= {"max_length": 64, "max_new_tokens": 6}
    values["training"] |= {"eval_batch_size": 4}
    return write_job(folder / "job.yaml", values)


@pytest.fixture
def start(folders, tmp_path):
    def run(*options, kind="joined"):
        job = job_of(folders, tmp_path, kind)
        return main(["train", str(job), *map(str, options)])

    return run


@pytest.fixture
def refused_task(folders, tmp_path, refused):
    def run(*options, kind="joined", data=None):
        return refused("train", job_of(folders, tmp_path, kind, data), *options)

    return run


@pytest.fixture(scope="module", params=KINDS)
def run(request, folders, tmp_path_factory):
    """Return a finished run whose ranks moved."""
    folder = tmp_path_factory.mktemp("run")
    job = job_of(folders, folder, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgreementTest, "is_significant", lambda self: True)
        quick = ("--training.max_steps=12", "--training.eval=no", "--training.save=no")
        assert main(["train", str(job), *quick]) == 0
    return SimpleNamespace(folder=folder / "run", kind=request.param, base=folders / request.param)


def written(kind, row):
    """Return the text before each text of a row to learn, and these texts."""
    form = "joined" if kind == "joined" else "chat"
    texts = row["captions"] if kind == "joined" else [row["tell"]]
    return REQUESTS[form].format(row["ask"]), [text + ENDS[form] for text in texts]


def stock_model(run):
    base = AutoModelForImageTextToText.from_pretrained(run.base)
    return PeftModel.from_pretrained(base, run.folder / "adapter").eval()


def inputs_of(processor, row, text):
    image = Image.open(io.BytesIO(row["image"]))
    return processor(images=[image], text=text, add_special_tokens=False, return_tensors="pt")


@torch.no_grad()
def measured(model, run, rows, *, completion_only=True):
    """Return the metrics of a model on rows, one text at a time, by definition."""
    processor = AutoProcessor.from_pretrained(run.base)
    losses, right = [], []
    for row in rows:
        request, texts = written(run.kind, row)
        for text in texts:
            inputs = inputs_of(processor, row, request + text)
            count = inputs["input_ids"].shape[1] - 1
            if completion_only:
                count = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
            told, logits = (
                inputs["input_ids"][0, -count:],
                model(**inputs).logits[0, -count - 1 : -1],
            )
            losses += cross_entropy(logits, told, reduction="none").tolist()
            right += (logits.argmax(dim=-1) == told).tolist()
    loss = torch.tensor(losses).mean()
    accuracy = sum(right) / len(right)
    return {"loss": float(loss), "perplexity": float(loss.exp()), "token_accuracy": accuracy}


def test_both_towers_learn_and_stock_peft_finds_the_reported_metrics(run):
    values = facts(run.folder)
    assert values["metrics_after"]["loss"] < 0.9 * values["metrics_before"]["loss"]
    assert values["parameters"]["peak"] <= values["budget"]
    for tower in ("vision", "text" if run.kind == "Idefics" else "language"):
        ranks = {r for name, r in values["final_ranks"].items() if f"model.{tower}" in name}
        assert ranks - {2}, "this test is about ranks that moved"
    wanted = measured(stock_model(run), run, make_rows(8, seed=2))
    assert values["metrics_after"] == pytest.approx(wanted, rel=1e-4)


def test_every_token_of_a_row_is_learned_if_not_only_completions(start, folders, tmp_path):
    quick = ("--training.max_steps=1", "--training.eval=no", "--training.save=no")
    assert start("--data.completion_only=false", *quick, kind="LLaVA") == 0
    run = SimpleNamespace(folder=tmp_path / "run", kind="LLaVA", base=folders / "LLaVA")
    wanted = measured(stock_model(run), run, make_rows(8, seed=2), completion_only=False)
    assert facts(run.folder)["metrics_after"] == pytest.approx(wanted, rel=1e-4)


def test_only_a_projector_without_weights_is_trained_in_full(run):
    config = read_json(run.folder / "adapter" / "adapter_config.json")
    adapted = [name for name in facts(run.folder)["final_ranks"] if PROJECTOR in name]
    if run.kind == "joined":
        assert config["modules_to_save"] == [PROJECTOR]
        assert adapted == []
    else:
        assert config["modules_to_save"] is None
        assert len(adapted) == 2 * (run.kind == "LLaVA")


def test_eval_repeats_the_metrics_of_the_run(run, said):
    values = said("eval", run.folder)
    assert values["metrics"] == pytest.approx(facts(run.folder)["metrics_after"], rel=1e-6)
    assert values["rows"] == sum(len(written(run.kind, r)[1]) for r in make_rows(8, seed=2))


@torch.no_grad()
def test_predict_writes_the_most_probable_tokens_in_batches_of_any_size(run, folders, said):
    file = folders / "data" / "validation.parquet"
    alone, together = (
        said("predict", run.folder, file, "--batch-size", size)["predictions"] for size in (1, 5)
    )
    assert alone == together
    model, processor = stock_model(run), AutoProcessor.from_pretrained(run.base)
    for row, found in zip(make_rows(8, seed=2), alone, strict=True):
        text, new = written(run.kind, row)[0], []
        inputs = inputs_of(processor, row, text)
        while len(new) < 6 and new[-1:] != [processor.tokenizer.eos_token_id]:
            ids = torch.cat([inputs["input_ids"], torch.tensor([new], dtype=torch.long)], dim=1)
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            new.append(int(model(**inputs | more).logits[0, -1].argmax()))
        wanted = processor.tokenizer.decode(new, skip_special_tokens=True)
        assert found == {"prediction": wanted}


def test_eval_counts_rows_with_an_answer_that_the_model_writes(run, said, tmp_path):
    rows, column = make_rows(8, seed=5), "captions" if run.kind == "joined" else "tell"
    file = write_rows(tmp_path / "rows.parquet", rows)
    found = said("predict", run.folder, file)["predictions"]
    for place, row in enumerate(rows):
        text = f"{found[place]['prediction']} " if place < 3 else "never written"
        row[column] = ["no", text] if column == "captions" else text
    file = write_rows(tmp_path / "answered.parquet", rows)
    values = said("eval", run.folder, "--data", file, "--exact-match")
    assert values["metrics"]["exact_match"] == 3 / 8


def test_rows_of_images_alone_get_a_line_each(run, tmp_path, capsys):
    kept = {"image"} if run.kind == "joined" else {"image", "ask"}
    rows = [{key: row[key] for key in kept} for row in make_rows(3, seed=6)]
    file = write_rows(tmp_path / "rows.parquet", rows)
    capsys.readouterr()
    assert main(["predict", str(run.folder), str(file)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.keys() for line in lines] == [kept - {"image"} | {"prediction"}] * 3


def test_a_merged_model_has_its_processor_and_the_same_metrics(run, tmp_path):
    out = tmp_path / "merged"
    options = ("--format", "merged", "--output", out)
    assert main(["export", *map(str, (run.folder / "adapter", *options))]) == 0
    merged = SimpleNamespace(kind=run.kind, base=out)
    found = measured(AutoModelForImageTextToText.from_pretrained(out), merged, make_rows(8, seed=2))
    assert found == pytest.approx(facts(run.folder)["metrics_after"], rel=1e-4)


@pytest.mark.usefixtures("moving")
def test_a_run_is_resumed_inside_an_epoch_with_the_same_captions(start, tmp_path):
    assert start("--training.eval=no") == 0
    assert f"base_model.model.{PROJECTOR}.linear_1.weight" in weights(tmp_path / "run")
    resume = ("--training.resume", tmp_path / "run" / "checkpoints" / "checkpoint-10")
    assert start("--training.eval=no", *resume, "--output", tmp_path / "again") == 0
    assert_same_weights(tmp_path / "run", tmp_path / "again")


def test_a_full_run_saves_a_model_that_captions_a_folder_of_images(start, tmp_path, said):
    quick = ("--training.max_steps=2", "--training.eval=no", "--training.save=no")
    assert start("--method=full", "--training.learning_rate=1e-3", *quick) == 0
    assert AutoProcessor.from_pretrained(tmp_path / "run" / "model").patch_size == 8
    (tmp_path / "images").mkdir()
    scene(0, 1).save(tmp_path / "images" / "one.png")
    values = said("predict", tmp_path / "run", tmp_path / "images")
    assert [set(row) for row in values["predictions"]] == [{"prediction"}]


def test_rows_and_settings_that_do_not_fit_are_refused(refused_task, tmp_path):
    message = refused_task("--data.image=picture")
    assert "`data.image` names the column 'picture'" in message
    message = refused_task("--data.max_length=8", kind="LLaVA")
    assert "13 tokens of image and prompt, above the limit of 7 in row 0" in message
    assert "Raise `data.max_length`" in message
    message = refused_task("--data.text=image")
    assert "column 'image' must hold a caption, or a list of captions, in every row" in message
    rows = make_rows(8, seed=1)
    rows[3]["tell"] = "red <image>"
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.parquet", rows)
    message = refused_task(kind="LLaVA", data=tmp_path / "data")
    assert "1 of 8 rows of the training split" in message
    assert "in row 3" in message
    message = refused_task("--lora.target_modules=[lm_head]")
    assert "must leave out the language model head" in message


def test_models_and_processors_that_do_not_fit_are_refused(refused_task, folders, tmp_path):
    message = refused_task("--model.path", save_language_model(tmp_path / "texts"))
    assert "texts could not be loaded: Can't load image processor" in message
    other = shutil.copytree(folders / "joined", tmp_path / "other")
    settings = read_json(other / "processor_config.json")
    told = json.dumps(settings | {"image_token": "<picture>"})
    (other / "processor_config.json").write_text(told)
    assert "but got '<picture>' for the LlavaProcessor" in refused_task("--model.path", other)
    told = json.dumps(settings | {"vision_feature_select_strategy": "full"})
    (other / "processor_config.json").write_text(told)
    message = refused_task("--model.path", other)
    assert "the LlavaForConditionalGeneration of" in message
    assert "Correct the processor's files" in message
