"""Base models that verbs refuse, and what of them a run saves."""

import io
import json
import shutil
import warnings

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from dynlora.cli.main import main
from tests.jobs import job_values, save_model, write_data, write_job, write_rows
from tests.pictures import picture_rows, save_vit
from tests.strange_models import drop_weights, put_code_beside

SHORT = {"max_steps": 2, "save_steps": 1, "batch_size": 8, "bf16": False, "save": "steps"}


@pytest.fixture
def job(tmp_path):
    """Return a function that writes the configuration of two steps on the folder `m`."""
    save_model(tmp_path / "m")
    write_data(tmp_path / "data", train=16, validation=8)

    def write(**values):
        made = job_values(tmp_path / "m", tmp_path / "data", tmp_path / "run") | {"method": "lora"}
        return write_job(tmp_path / "job.yaml", made | {"training": SHORT} | values)

    return write


def test_code_beside_a_model_does_not_run_even_if_the_user_would_say_yes(
    job, refused, tmp_path, monkeypatch
):
    file = job()
    assert main(["train", str(file)]) == 0
    put_code_beside(tmp_path / "m", tmp_path / "ran")
    verbs = (
        ["train", file, "--overwrite", "true"],
        ["train", file, "--dry-run", "--overwrite", "true"],
        ["eval", tmp_path / "run"],
        ["predict", tmp_path / "run", tmp_path / "data" / "validation.jsonl"],
        ["export", tmp_path / "run" / "adapter", "--format", "merged", "--output", tmp_path / "x"],
    )  # fmt: skip
    for verb in verbs:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        assert f"{tmp_path / 'm'} could not be loaded: " in refused(*verb)
        assert not (tmp_path / "ran").exists()


def test_no_verb_uses_a_model_whose_files_lack_weights(job, refused, tmp_path):
    file = job()
    assert main(["train", str(file)]) == 0
    shutil.copytree(tmp_path / "m", tmp_path / "other")
    drop_weights(tmp_path / "other", "bert.encoder.layer.1.output")
    verbs = (
        ["train", file, "--model.path", tmp_path / "other", "--overwrite", "true"],
        ["eval", tmp_path / "run", "--model", tmp_path / "other"],
        ["export", tmp_path / "run" / "adapter", "--format", "merged", "--output", tmp_path / "x",
         "--model", tmp_path / "other"],
    )  # fmt: skip
    for verb in verbs:
        told = refused(*verb)
        assert f"{tmp_path / 'other'} could not be loaded: 4 of its 41 weights" in told
    assert not (tmp_path / "x").exists()


def test_a_model_without_a_pooler_trains_with_a_note_and_is_evaluated_as_trained(
    job, tmp_path, capsys
):
    drop_weights(tmp_path / "m", "bert.pooler")
    assert main(["train", str(job())]) == 0
    told = capsys.readouterr().err
    assert told.count("note: ") == 1
    assert "no weights for bert.pooler" in told
    after = json.loads((tmp_path / "run" / "run.json").read_text())["metrics_after"]
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found == pytest.approx(after, abs=1e-6)
    merged = ["export", str(tmp_path / "run" / "adapter"), "--format", "merged"]
    assert main([*merged, "--output", str(tmp_path / "merged")]) == 0


def test_a_model_in_half_precision_is_evaluated_with_the_head_that_was_trained(
    job, tmp_path, capsys
):
    assert main(["train", str(job(model={"path": str(tmp_path / "m"), "dtype": "bfloat16"}))]) == 0
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in saved.values()} == {"torch.float32"}
    after = json.loads((tmp_path / "run" / "run.json").read_text())["metrics_after"]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(after, abs=1e-6)
    again = job(lora={"start_from": str(tmp_path / "run" / "adapter")}, output=str(tmp_path / "2"),
                model={"path": str(tmp_path / "m"), "dtype": "bfloat16"})  # fmt: skip
    assert main(["train", str(again)]) == 0
    before = json.loads((tmp_path / "2" / "run.json").read_text())["metrics_before"]
    assert before == pytest.approx(after, abs=1e-6), "it goes on from the very weights"


@pytest.mark.parametrize(
    ("lora", "kept"),
    [
        ({"target_modules": ["word_embeddings", "query"]}, ".lora_embedding_A"),
        ({"target_modules": ["query"], "modules_to_save": ["word_embeddings"]}, ".weight"),
    ],
)
def test_embeddings_that_were_trained_are_saved_and_others_are_not(job, tmp_path, lora, kept):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main(["train", str(job(lora={"r": 2, **lora}))]) == 0
    assert not [w for w in said if "save_embedding" in str(w.message)]
    assert not [w for w in said if "config file" in str(w.message)]
    folders = [tmp_path / "run" / "adapter", *(tmp_path / "run" / "checkpoints").iterdir()]
    assert len(folders) >= 2
    for folder in folders:
        names = load_file(folder / "adapter_model.safetensors")
        assert [n for n in names if f"word_embeddings{kept}" in n]
        assert not [n for n in names if "base_layer" in n]
    last = max(folders[1:], key=lambda folder: int(folder.name.rpartition("-")[2]))
    final, newest = (load_file(f / "adapter_model.safetensors") for f in (folders[0], last))
    assert final.keys() == newest.keys()
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    before = base.bert.embeddings.word_embeddings.weight.clone()
    merged = PeftModel.from_pretrained(base, last).merge_and_unload()
    assert not before.equal(merged.bert.embeddings.word_embeddings.weight)


def test_pictures_of_a_size_that_the_model_cannot_read_are_refused_before_a_run(refused, tmp_path):
    save_vit(tmp_path / "m")
    path = tmp_path / "m" / "preprocessor_config.json"
    size = {"size": {"height": 24, "width": 24}}
    path.write_text(json.dumps(json.loads(path.read_text()) | size))
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.parquet", picture_rows(4))
    values = job_values(tmp_path / "m", tmp_path / "data", tmp_path / "run")
    values |= {"task": "image_classification", "method": "lora", "training": SHORT}
    values["data"] = {"path": str(tmp_path / "data")}
    told = refused("train", write_job(tmp_path / "job.yaml", values))
    assert "got shape (3, 24, 24)" in told
    assert not (tmp_path / "run").exists()
