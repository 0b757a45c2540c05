"""Base models that verbs refuse, and the parts of them that a run saves."""

import io
import shutil
import warnings

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.cli.finished import facts, finish
from tests.strange_models import drop_weights, put_code_beside

SHORT = ("--method=lora", "--training.max_steps=2", "--training.save_steps=1")


def test_code_beside_a_model_does_not_run_even_if_the_user_would_say_yes(
    job, refused, copy, model, data, tmp_path, monkeypatch
):
    other = shutil.copytree(model, tmp_path / "m")
    put_code_beside(other, tmp_path / "ran")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(model), str(other)))
    for verb in (
        ["train", job, "--model.path", other],
        ["train", job, "--model.path", other, "--dry-run"],
        ["eval", copy],
        ["predict", copy, data / "validation.jsonl"],
        ["export", copy / "adapter", "--model", other, "--format", "merged", "--output", "x"],
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        assert f"{other} could not be loaded: " in refused(*verb)
        assert not (tmp_path / "ran").exists()


def test_no_verb_uses_a_model_whose_files_lack_weights(job, refused, finished, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    drop_weights(other, "bert.encoder.layer.1.output")
    export = ["export", finished / "adapter", "--format", "merged", "--output", tmp_path / "x"]
    for verb in (
        ["train", job, "--model.path", other],
        ["eval", finished, "--model", other],
        [*export, "--model", other],
    ):
        assert f"{other} could not be loaded: 4 of its 41 weights" in refused(*verb)


def test_a_model_without_a_pooler_trains_with_a_note_and_is_evaluated_as_trained(
    train, model, output, tmp_path, said, capsys
):
    other = shutil.copytree(model, tmp_path / "m")
    drop_weights(other, "bert.pooler")
    assert train("--model.path", other, *SHORT) == 0
    told = capsys.readouterr().err
    assert told.count("note: ") == 1
    assert "no weights for bert.pooler" in told
    after = facts(output)["metrics_after"]
    assert said("eval", output)["metrics"] == pytest.approx(after, abs=1e-6)
    said("export", output / "adapter", "--format", "merged", "--output", tmp_path / "merged")


def test_a_model_in_half_precision_is_evaluated_with_the_head_that_was_trained(
    model, data, tmp_path, said
):
    half = (*SHORT, "--model.dtype=bfloat16")
    run = finish(tmp_path, model, data, *half)
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in saved.values()} == {"torch.float32"}
    after = facts(run)["metrics_after"]
    assert said("eval", run)["metrics"] == pytest.approx(after, abs=1e-6)
    again = finish(tmp_path / "2", model, data, *half, "--lora.start_from", run / "adapter")
    before = facts(again)["metrics_before"]
    assert before == pytest.approx(after, abs=1e-6), "it goes on from the very weights"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--lora.target_modules=[word_embeddings, query]"], ".lora_embedding_A"),
        (["--lora.target_modules=[query]", "--lora.modules_to_save=[word_embeddings]"], ".weight"),
    ],
)
def test_embeddings_that_were_trained_are_saved_and_others_are_not(
    model, data, tmp_path, options, kept
):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run = finish(tmp_path, model, data, *SHORT, *options)
    words = [str(warning.message) for warning in found]
    assert not [text for text in words if "save_embedding" in text or "config file" in text]
    folders = [run / "adapter", *sorted((run / "checkpoints").iterdir())]
    assert len(folders) >= 2
    for folder in folders:
        names = load_file(folder / "adapter_model.safetensors")
        assert [n for n in names if f"word_embeddings{kept}" in n]
        assert not [n for n in names if "base_layer" in n]
    final, newest = (load_file(folders[at] / "adapter_model.safetensors") for at in (0, -1))
    assert final.keys() == newest.keys()
    base = AutoModelForSequenceClassification.from_pretrained(model)
    before = base.bert.embeddings.word_embeddings.weight.clone()
    merged = PeftModel.from_pretrained(base, folders[-1]).merge_and_unload()
    assert not before.equal(merged.bert.embeddings.word_embeddings.weight)
