"""`dynlora combine`: one adapter of several, which stock PEFT loads."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from dynlora.cli.main import main
from tests.adapters import change_config, save_adapter, save_classifier_adapter
from tests.jobs import missing, save_model

HEAD = "base_model.model.classifier.weight"


@pytest.fixture
def pair(adapter, model, tmp_path):
    """Return the folders of two adapters of ranks 4 and 2, the second without feed-forwards."""
    save_classifier_adapter(tmp_path / "other", model, r=2, target_modules=["query", "key"])
    return adapter, tmp_path / "other"


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ([], {4, 2, 6}),
        (["--method", "ties", "--rank", 3], {3}),
        (["--method", "dare", "--density", 0.9, "--rank", 3], {3}),
    ],
)
def test_a_combination_loads_in_peft_with_its_ranks(options, ranks, pair, model, tmp_path, said):
    made = said("combine", *pair, "--output", tmp_path / "made", *options)
    base = AutoModelForSequenceClassification.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "made").base_model.model
    for layer in made["layers"]:
        assert loaded.get_submodule(layer["name"]).r["default"] == layer["rank_after"]
        assert 0 < layer["energy_kept"] <= 1 + 1e-9
    names = {layer["name"].rpartition(".")[2] for layer in made["layers"]}
    assert names == {"query", "key", "value", "dense"}
    assert {layer["rank_after"] for layer in made["layers"]} == ranks
    assert {layer["rank_before"] for layer in made["layers"]} == {4, 2, 6}
    total = made["parameters_before"]
    assert (made["parameters"] == total) == (not options)
    heads = [load_file(folder / "adapter_model.safetensors")[HEAD] for folder in pair]
    torch.testing.assert_close(loaded.classifier.weight, sum(heads) / 2)


def test_the_table_has_the_ranks_and_a_note_the_base_models(pair, tmp_path, capsys):
    change_config(pair[1], base_model_name_or_path="someone/else")
    arguments = ["combine", *pair, "--output", tmp_path / "made", "--weights", "0.9,0.1"]
    assert main([str(argument) for argument in arguments]) == 0
    shown = capsys.readouterr()
    assert missing(" ".join(shown.out.split()), "attention.self.query 6 -> 6 | 100.0%") == []
    assert "of one base model, but they name" in shown.err
    assert "someone/else" in shown.err
    assert main(["inspect", str(tmp_path / "made"), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "tis"], "'tis' | ties"),
        (["--method", "ties"], "`--method ties` needs `--rank R` | got none"),
        (["--rank", "2"], "`--rank` | left out | got 2 | dynlora resize"),
        (["--density", "0.2"], "`--density` | left out | 0.2"),
        (["--method", "ties", "--rank", "2", "--density", "1"], "--density' | 0<x<1"),
        (["--weights", "0.5"], "`--weights` | 0.5,0.5 | got 0.5"),
        (["--weights", "0.5,half"], "got 0.5,half"),
        (["--weights", "nan,1"], "got nan,1"),
        (["--weights", "1,-1"], "must not add up to 0 | [1.0, -1.0] | classifier"),
    ],
)
def test_wrong_options_are_refused(options, told, pair, tmp_path, refused):
    assert missing(refused("combine", *pair, "--output", tmp_path / "made", *options), told) == []


def headless(folder, model):
    save_classifier_adapter(folder, model, task_type=None)


def other_widths(folder, _):
    save_classifier_adapter(folder, save_model(folder / "base", hidden=24))


def biased(folder, model):
    save_classifier_adapter(folder, model, lora_bias=True)


def as_kohya(place, _):
    save_adapter(place.parent / "peft", "patterns")
    made = place.with_suffix(".safetensors")
    options = ("--format", "kohya", "--component", "unet", "--output", str(made))
    assert main(["export", str(place.parent / "peft"), *options]) == 0
    made.rename(place)


@pytest.mark.filterwarnings("ignore:.*lora_B.bias")  # PEFT takes it for a sharded weight
@pytest.mark.parametrize(
    ("save", "told"),
    [
        (headless, "same shape of 'base_model.model.classifier.bias' | (2,) in {} | None in {}"),
        (other_widths, "same shapes in layer 'bert.encoder.layer.0 | 16 | 24"),
        (as_kohya, "same format | peft in {} | kohya in {}"),
        (biased, "same value of `lora_bias` | None in {} | True in {}"),
    ],
)
def test_adapters_that_cannot_be_one_are_refused(save, told, adapter, model, tmp_path, refused):
    save(tmp_path / "other", model)
    line = refused("combine", adapter, tmp_path / "other", "--output", tmp_path / "made")
    assert missing(line, told.format(adapter, tmp_path / "other")) == []
