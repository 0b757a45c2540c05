"""`dynlora compress`: an adapter within a budget, which stock PEFT loads."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from dynlora.cli.main import main
from tests.adapters import save_classifier_adapter
from tests.cli.bad_adapters import BROKEN
from tests.jobs import save_model, save_tokenizer
from tests.pictures import save_vit


@pytest.fixture
def adapter(model, tmp_path):
    """Return the folder of an adapter of rank 4 on the 13 linear layers of a tiny BERT."""
    save_classifier_adapter(tmp_path / "adapter", model)
    return tmp_path / "adapter"


def run(adapter, output, *options):
    arguments = ["compress", adapter, "--output", output, *options]
    return main([str(argument) for argument in arguments])


def result(adapter, output, capsys, *options):
    capsys.readouterr()
    assert run(adapter, output, *options, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def error(adapter, tmp_path, capsys):
    """Return a runner that must fail and write nothing; it returns the error's line."""

    def fail(*options):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert run(adapter, tmp_path / "made", *options) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("error:") == 1
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err

    return fail


def load(model, folder):
    base = AutoModelForSequenceClassification.from_pretrained(model)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("budget", ["50%", "1200"])
def test_a_cut_adapter_is_within_its_budget_and_loads_in_peft(
    budget, model, adapter, tmp_path, capsys
):
    said = result(adapter, tmp_path / "made", capsys, "--budget", budget)
    assert said["budget"] == (said["parameters_before"] // 2 if "%" in budget else 1200)
    cheapest = min(layer["parameters"] // layer["rank_after"] for layer in said["layers"])
    assert said["budget"] - cheapest < said["parameters"] <= said["budget"]
    assert len({layer["rank_after"] for layer in said["layers"]}) > 1
    loaded = load(model, tmp_path / "made").base_model.model
    for layer in said["layers"]:
        module = loaded.get_submodule(layer["name"])
        assert module.r["default"] == layer["rank_after"]
        assert (
            module.lora_A["default"].weight.numel() + module.lora_B["default"].weight.numel()
            == layer["parameters"]
        )
    given = load(model, adapter).base_model.model.classifier.weight
    assert torch.equal(loaded.classifier.weight, given)


def test_data_that_is_seen_decides_what_is_kept(model, adapter, data, tmp_path, capsys):
    options = ["--budget", "60%", "--data", data / "train.jsonl", "--text", "text"]
    blind = result(adapter, tmp_path / "blind", capsys, "--budget", "60%")
    seen = result(adapter, tmp_path / "seen", capsys, *options, "--rows", "16")
    assert seen["weighted"] is True
    assert blind["weighted"] is False
    assert {layer["output_lost"] is None for layer in blind["layers"]} == {True}
    assert all(0 <= layer["output_lost"] < 1 for layer in seen["layers"])
    tokens = torch.randint(4, 15, (16, 8))
    with torch.no_grad():
        given, weighted, unweighted = (
            load(model, folder)(input_ids=tokens).logits
            for folder in (adapter, tmp_path / "seen", tmp_path / "blind")
        )
    assert (weighted - given).norm() < (unweighted - given).norm()


def test_pairs_of_texts_are_read_together(adapter, data, tmp_path, capsys):
    options = ["--data", data / "validation.jsonl", "--text", "text", "--text-pair", "other"]
    said = result(adapter, tmp_path / "made", capsys, "--budget", "50%", *options)
    assert said["weighted"] is True


def test_the_table_tells_ranks_before_and_after(adapter, tmp_path, capsys):
    capsys.readouterr()
    assert run(adapter, tmp_path / "made", "--budget", "50%") == 0
    table = capsys.readouterr().out
    assert "bert.encoder.layer.0.attention.self.query" in table
    assert "4 -> " in table
    assert "energy kept" in table


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ("0", ["`--budget`", "at least 1", "got 0"]),
        ("half", ["`--budget`", "got half"]),
        ("0%", ["`--budget`", "got 0%"]),
        ("150%", ["`--budget`", "up to 100%", "got 150%"]),
        ("12.5", ["`--budget`", "whole number", "got 12.5"]),
        ("5", ["one rank in each of", "got 5", "use a budget in ["]),
        ("nan%", ["`--budget`", "got nan%"]),
    ],
)
def test_a_budget_that_is_none_or_too_small_is_refused(budget, told, error):
    line = error("--budget", budget)
    for part in told:
        assert part in line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--text", "text"], ["`--text`", "`--data FILE`"]),
        (["--rows", "5"], ["`--rows`", "`--data FILE`"]),
        (["--model", "x"], ["`--model`", "`--data FILE`"]),
        (["--data", "absent.csv"], ["`--text COLUMN`"]),
        (["--data", "absent.csv", "--text", "text"], ["absent.csv"]),
        (["--data", "absent.csv", "--text", "text", "--rows", "0"], ["`--rows`", "got 0"]),
    ],
)
def test_options_of_the_data_are_checked(options, told, error):
    line = error("--budget", "50%", *options)
    for part in told:
        assert part in line


def test_a_column_that_is_missing_is_named_with_those_that_are_there(error, data):
    line = error("--budget", "50%", "--data", data / "train.jsonl", "--text", "sentence")
    assert "'sentence'" in line
    assert "text, other, label" in line


def test_a_second_column_that_is_missing_is_told_by_its_own_option(error, data):
    options = ["--data", data / "train.jsonl", "--text", "text", "--text-pair", "second"]
    line = error("--budget", "50%", *options)
    assert "`--text-pair` must be a column of" in line
    assert "'second'" in line


def test_an_empty_cell_is_no_text(error, data, tmp_path):
    (tmp_path / "rows.csv").write_text('text,label\nred,1\n,0\n"",0\n')
    line = error("--budget", "50%", "--data", tmp_path / "rows.csv", "--text", "text")
    assert "must hold texts, got None in row 1" in line


def test_texts_for_a_model_of_images_are_refused_as_such(data, tmp_path, capsys):
    vit = save_vit(tmp_path / "vit")
    base = ViTForImageClassification.from_pretrained(vit)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "images")
    options = ["--budget", "50%", "--data", data / "train.jsonl", "--text", "text"]
    assert run(tmp_path / "images", tmp_path / "made", *options) == 2
    line = capsys.readouterr().err
    assert "must read texts" in line
    assert "a ViTForImageClassification, which reads pixel_values of images" in line
    assert "sentencepiece" not in line
    assert not (tmp_path / "made").exists()


def test_data_for_an_adapter_of_another_model_is_refused(error, data, tmp_path):
    other = save_model(tmp_path / "other", hidden=24)
    line = error(
        "--budget", "50%", "--data", data / "train.jsonl", "--text", "text", "--model", other
    )
    assert "(24, 24)" in line
    assert "(16, 16)" in line


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_and_nothing_is_written(name, adapter, error):
    spoil, told = BROKEN[name]
    spoil(adapter)
    line = error("--budget", "50%")
    for part in told:
        assert part in line


def test_an_output_that_holds_anything_is_left_alone(adapter, tmp_path, capsys):
    given = {path: path.read_bytes() for path in adapter.iterdir()}
    assert run(adapter, adapter, "--budget", "50%") == 2
    assert "which holds" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in adapter.iterdir()} == given


@pytest.mark.parametrize("output", [".", ".."])
def test_an_output_without_a_name_is_refused(output, adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "here")
    assert run(adapter, output, "--budget", "50%") == 2
    assert "`--output` must be the name of a folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("adapter_config.json"))[1:]


def test_an_encoder_decoder_is_shown_the_text_as_what_it_says(data, tmp_path, capsys):
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")
    settings = LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    get_peft_model(base, settings).save_pretrained(tmp_path / "t5-adapter")
    given = ["--data", data / "train.jsonl", "--text", "text", "--model", tmp_path / "t5"]
    made = result(tmp_path / "t5-adapter", tmp_path / "made", capsys, "--budget", "50%", *given)
    assert any("decoder" in layer["name"] for layer in made["layers"])
