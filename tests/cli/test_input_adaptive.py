"""Input-adaptive ranks from the command line: trained, saved, evaluated on and off, resumed."""

import shutil
from pathlib import Path

import pytest
from torch import tensor
from torch.nn.functional import cross_entropy

from dynlora.cli.main import main
from tests.cli.finished import facts, finish, read_json, run_job, stock_logits
from tests.jobs import make_rows, missing, write_rows
from tests.language import language_job, make_pairs, save_language_model, write_pairs

ON = (
    "--dynamic.input_adaptive=true",
    "--lora.r=8",
    "--lora.lora_alpha=16",
    "--training.save_total_limit=null",
)
FILE = "input_adaptive.json"


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory, model, data):
    return finish(tmp_path_factory.mktemp("adaptive"), model, data, *ON)


@pytest.fixture(scope="module")
def writing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writing")
    model, data = save_language_model(folder / "model"), write_pairs(folder / "pairs")
    return run_job(folder, language_job(model, data, folder / "run"), *ON)


def test_eval_gives_the_numbers_of_the_run_and_with_it_off_those_of_stock_libraries(
    adaptive, model, said
):
    on, off = said("eval", adaptive), said("eval", adaptive, "--input-adaptive", "off")
    assert on["metrics"] == facts(adaptive)["metrics_after"]
    assert (on["input_adaptive"], off["input_adaptive"]) == (True, False)
    rows = make_rows(16, seed=2)
    logits = stock_logits(adaptive, model, [row["text"] for row in rows])
    loss = float(cross_entropy(logits, tensor([row["label"] for row in rows])))
    assert off["metrics"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert abs(on["metrics"]["loss"] - loss) > 1e-4


def test_what_predict_says_depends_on_it_and_not_on_the_batch(adaptive, tmp_path, said):
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(20, seed=7))

    def likely(*options):
        found = said("predict", adaptive, rows, *options)["predictions"]
        return [row["probabilities"][0] for row in found]

    together = likely("--batch-size", "20")
    assert likely("--batch-size", "1", "--input-adaptive", "on") == pytest.approx(
        together, abs=1e-5
    )
    off = likely("--input-adaptive", "off")
    assert max(abs(a - b) for a, b in zip(off, together, strict=True)) > 1e-3


def test_the_adapter_and_every_checkpoint_have_thresholds_and_resume_to_the_same_bytes(
    adaptive, tmp_path, model, data
):
    final = read_json(adaptive / "adapter" / FILE)
    assert (final["complexity"], len(final["thresholds"])) == ("example", 3)
    saved = {
        folder.name: read_json(folder / FILE)["thresholds"]
        for folder in (adaptive / "checkpoints").iterdir()
    }
    assert saved["checkpoint-10"] == final["thresholds"] != saved["checkpoint-5"] != []
    source = shutil.copytree(adaptive, tmp_path / "source") / "checkpoints/checkpoint-5"
    resumed = finish(tmp_path, model, data, *ON, f"--training.resume={source}")
    for name in ("adapter_model.safetensors", FILE):
        path = Path("adapter") / name
        assert (resumed / path).read_bytes() == (adaptive / path).read_bytes()


def test_a_run_trained_without_cannot_switch_it_on(refused, finished, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(3))
    for verb, more in (("eval", ()), ("predict", (rows,))):
        told = refused(verb, finished, *more, "--input-adaptive", "on")
        assert missing(told, "trained without", str(finished)) == []


def test_thresholds_that_cannot_be_read_are_refused_and_off_still_works(
    refused, adaptive, tmp_path
):
    run = shutil.copytree(adaptive, tmp_path / "copy")
    file = run / "adapter" / FILE
    for content in ("{", '{"thresholds": []}', "[]"):
        file.write_text(content)
        assert str(file) in refused("eval", run)
    file.unlink()
    assert str(file) in refused("eval", run)
    assert main(["eval", str(run), "--input-adaptive", "off"]) == 0


def test_layers_that_it_cannot_reach_are_refused_before_anything_is_written(error):
    told = error(*ON, "--lora.target_modules=[word_embeddings]")
    assert missing(told, "bert.embeddings.word_embeddings", "input_adaptive=False") == []


def test_a_language_model_is_evaluated_and_writes_as_it_was_trained_whatever_the_batch(
    writing, tmp_path, said
):
    assert read_json(writing / "adapter" / FILE)["complexity"] == "prefix"
    on, off = said("eval", writing), said("eval", writing, "--input-adaptive", "off")
    assert on["metrics"] == facts(writing)["metrics_after"]
    assert abs(on["metrics"]["loss"] - off["metrics"]["loss"]) > 1e-4
    alone = said("eval", writing, "--batch-size", "1")["metrics"]
    assert alone == pytest.approx(on["metrics"], abs=1e-5)
    rows = write_rows(tmp_path / "rows.jsonl", make_pairs(12, seed=5))
    together, alone = (said("predict", writing, rows, "--batch-size", size) for size in (12, 1))
    assert together == alone
