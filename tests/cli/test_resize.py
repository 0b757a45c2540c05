"""`dynlora resize`: an adapter of other ranks, which stock PEFT loads."""

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
from tests.jobs import missing, save_model, save_tokenizer
from tests.pictures import save_vit


@pytest.fixture
def result(said):
    return lambda given, made, *options: said("resize", given, "--output", made, *options)


@pytest.fixture
def error(refused, adapter, tmp_path):
    return lambda *options: refused("resize", adapter, "--output", tmp_path / "made", *options)


def load(model, folder):
    base = AutoModelForSequenceClassification.from_pretrained(model)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("budget", ["50%", "1200"])
def test_a_cut_adapter_is_within_its_budget_and_loads_in_peft(
    budget, model, adapter, tmp_path, result
):
    made = result(adapter, tmp_path / "made", "--budget", budget)
    assert made["budget"] == (made["parameters_before"] // 2 if "%" in budget else 1200)
    cheapest = min(layer["parameters"] // layer["rank_after"] for layer in made["layers"])
    assert made["budget"] - cheapest < made["parameters"] <= made["budget"]
    assert len({layer["rank_after"] for layer in made["layers"]}) > 1
    loaded = load(model, tmp_path / "made").base_model.model
    for layer in made["layers"]:
        module = loaded.get_submodule(layer["name"])
        assert module.r["default"] == layer["rank_after"]
        factors = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert sum(factor.numel() for factor in factors) == layer["parameters"]
    given = load(model, adapter).base_model.model.classifier.weight
    assert torch.equal(loaded.classifier.weight, given)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (["--rank", "2"], {2}),
        (["--rank", "6"], {6}),
        (["--error", "0"], {4}),
        (["--error", "0.99"], {1}),
    ],
)
def test_one_rank_or_an_error_decides_on_the_size(options, ranks, model, adapter, tmp_path, result):
    made = result(adapter, tmp_path / "made", *options)
    assert {layer["rank_after"] for layer in made["layers"]} == ranks
    assert made["budget"] is None
    loaded = load(model, tmp_path / "made").base_model.model
    modules = [loaded.get_submodule(layer["name"]) for layer in made["layers"]]
    assert {module.r["default"] for module in modules} == ranks


def test_observed_data_decides_on_the_directions_to_keep(model, adapter, data, tmp_path, result):
    options = ["--budget", "60%", "--data", data / "train.jsonl", "--text", "text"]
    blind = result(adapter, tmp_path / "blind", "--budget", "60%")
    seen = result(adapter, tmp_path / "seen", *options, "--rows", "16")
    assert (seen["weighted"], blind["weighted"]) == (True, False)
    assert {layer["output_lost"] is None for layer in blind["layers"]} == {True}
    assert all(0 <= layer["output_lost"] < 1 for layer in seen["layers"])
    tokens = torch.randint(4, 15, (16, 8))
    with torch.no_grad():
        given, weighted, unweighted = (
            load(model, folder)(input_ids=tokens).logits
            for folder in (adapter, tmp_path / "seen", tmp_path / "blind")
        )
    assert (weighted - given).norm() < (unweighted - given).norm()


def test_pairs_of_texts_are_read_together_and_the_table_has_the_ranks(
    adapter, data, tmp_path, capsys
):
    given = ["--data", data / "validation.jsonl", "--text", "text", "--text-pair", "other"]
    options = ["--output", tmp_path / "made", "--budget", "50%", *given]
    assert main(["resize", str(adapter), *map(str, options)]) == 0
    told = "bert.encoder.layer.0.attention.self.query | 4 ->  | energy kept | output lost"
    assert missing(capsys.readouterr().out, told) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "exactly one of `--rank`, `--budget` and `--error` | got none"),
        (["--rank", "2", "--error", "0.1"], "exactly one of | got `--rank` and `--error`"),
        (["--rank", "0"], "'--rank' | 0 is not in the range"),
        (["--rank", "999"], "`--rank` | at most | got 999"),
        (["--error", "1"], "'--error' | 0<=x<1"),
    ],
)
def test_a_wrong_size_is_refused(options, told, error):
    assert missing(error(*options), told) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["0"], "`--budget` | at least 1 | got 0"),
        (["half"], "`--budget` | got half"),
        (["0%"], "`--budget` | got 0%"),
        (["12.5"], "`--budget` | a number of parameters | got 12.5"),
        (["5"], "one rank in each of | got 5 | Use a budget of at least"),
        (["nan%"], "`--budget` | got nan%"),
        (["50%", "--text", "text"], "`--text` | `--data FILE`"),
        (["50%", "--rows", "5"], "`--rows` | `--data FILE`"),
        (["50%", "--model", "x"], "`--model` | `--data FILE`"),
        (["50%", "--data", "absent.csv"], "`--text COLUMN`"),
        (["50%", "--data", "absent.csv", "--text", "text"], "absent.csv"),
        (["50%", "--data", "a.csv", "--text", "text", "--rows", "0"], "'--rows' | 0 is not in"),
    ],
)
def test_a_wrong_budget_or_option_is_refused(options, told, error):
    assert missing(error("--budget", *options), told) == []


def test_wrong_data_is_refused_with_option_column_and_row(error, data, tmp_path):
    (tmp_path / "rows.csv").write_text('text,label\nred,1\n,0\n"",0\n')
    other = save_model(tmp_path / "other", hidden=24)
    train = ["--budget", "50%", "--data", data / "train.jsonl", "--text"]
    for options, told in (
        ([*train, "sentence"], "`--text` | 'sentence' | text, other, label"),
        ([*train, "text", "--text-pair", "second"], "`--text-pair` | 'second'"),
        (["--budget", "50%", "--data", tmp_path / "rows.csv", "--text", "text"], "None in row 1"),
        ([*train, "text", "--model", other], "(24, 24) instead of (16, 16)"),
    ):
        assert missing(error(*options), told) == []


def test_rows_are_spread_evenly_over_the_file(adapter, tmp_path, result, error):
    (tmp_path / "rows.csv").write_text("text,label\n" + "red,1\n,0\n" * 5)  # half are missing
    options = ["--rank", "2", "--data", tmp_path / "rows.csv", "--text", "text"]
    assert result(adapter, tmp_path / "seen", *options, "--rows", "5")["weighted"]
    assert "5 of 10 rows" in error(*options)


def test_texts_for_an_image_model_are_refused(data, tmp_path, refused):
    vit = save_vit(tmp_path / "vit")
    base = ViTForImageClassification.from_pretrained(vit)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "images")
    line = refused("resize", tmp_path / "images", "--output", tmp_path / "made", "--budget",
                   "50%", "--data", data / "train.jsonl", "--text", "text")  # fmt: skip
    assert "must read texts" in line
    assert "a ViTForImageClassification, which reads pixel_values of images" in line
    assert "sentencepiece" not in line


def test_a_broken_adapter_or_an_existing_output_is_left_alone(adapter, error, refused):
    assert "contains" in refused("resize", adapter, "--output", adapter, "--budget", "50%")
    (adapter / "adapter_model.safetensors").unlink()
    assert "got none" in error("--budget", "50%")


def test_the_decoder_of_an_encoder_decoder_reads_the_text_too(data, tmp_path, result):
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
    made = result(tmp_path / "t5-adapter", tmp_path / "made", "--budget", "50%", *given)
    assert any("decoder" in layer["name"] for layer in made["layers"])
