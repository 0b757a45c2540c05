"""`dynlora inspect`: the figures of any LoRA adapter, without its base model."""

import json
import math

import pytest
import torch

from dynlora.cli.main import main
from tests.adapters import save_adapter, save_classifier_adapter
from tests.cli.bad_adapters import BROKEN


def inspect(folder, capsys, *options):
    assert main(["inspect", str(folder), *options]) == 0
    return capsys.readouterr().out


def test_the_figures_are_those_of_the_dense_updates(tmp_path, capsys):
    model = save_adapter(tmp_path, "rslora")
    said = json.loads(inspect(tmp_path, capsys, "--json"))
    updates = {
        layer["name"]: model.base_model.model.get_submodule(layer["name"])
        .get_delta_weight("default")
        .detach()
        .double()
        for layer in said["layers"]
    }
    assert len(updates) == 14
    total = sum(float(update.square().sum()) for update in updates.values())
    for layer in said["layers"]:
        squares = torch.linalg.svdvals(updates[layer["name"]]).square()[: layer["rank"]]
        parts = squares / squares.sum()
        half = (layer["rank"] + 1) // 2
        assert layer["norm"] == pytest.approx(float(squares.sum().sqrt()), rel=1e-5)
        assert layer["energy_share"] == pytest.approx(float(squares.sum()) / total, rel=1e-5)
        assert layer["kept_by_half"] == pytest.approx(float(parts[:half].sum()), rel=1e-5)
        entropy = -float((parts * parts.clamp(min=1e-30).log()).sum())
        assert layer["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-4)


def test_parameters_are_those_that_peft_trains(tmp_path, capsys):
    model = save_adapter(tmp_path, "patterns")
    said = json.loads(inspect(tmp_path, capsys, "--json"))
    trainable, _ = model.get_nb_trainable_parameters()
    assert said["parameters"] == trainable == sum(row["parameters"] for row in said["layers"])
    assert sum(row["share"] for row in said["layers"]) == pytest.approx(1)
    assert {row["name"].rpartition(".")[2]: row["rank"] for row in said["layers"]}["q_proj"] == 7


def test_the_table_names_layers_base_model_and_what_else_is_in_the_file(model, tmp_path, capsys):
    save_classifier_adapter(tmp_path, model)
    table = inspect(tmp_path, capsys)
    assert "bert.encoder.layer.0.attention.self.query" in table
    assert "16 x 16" in table
    assert str(model) in table.replace("\n", "")
    assert "34 parameters of other modules" in " ".join(table.split())


def test_names_with_markup_are_printed_as_they_are(tmp_path, capsys):
    save_adapter(tmp_path, "plain")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "[bold]x[/bold]"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert "[bold]x[/bold]" in inspect(tmp_path, capsys)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_plain_lora_adapter_is_refused_by_name(name, model, tmp_path, capsys):
    save_classifier_adapter(tmp_path / "adapter", model)
    spoil, told = BROKEN[name]
    spoil(tmp_path / "adapter")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapter")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert len(line) < 5000
    for part in told:
        assert part in line, line


def test_a_run_folder_is_answered_with_its_adapter(tmp_path, capsys):
    save_adapter(tmp_path / "run" / "adapter", "plain")
    assert main(["inspect", str(tmp_path / "run")]) == 2
    assert f"give {tmp_path / 'run' / 'adapter'}" in capsys.readouterr().err
