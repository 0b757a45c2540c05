"""`dynlora inspect`: the figures of any LoRA adapter, or one line on the fault of a broken one."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynlora.cli.main import main
from tests.adapters import change_config, save_adapter
from tests.jobs import missing

WEIGHTS = "adapter_model.safetensors"
LONG = "x" * 1_000_000
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def configure(**values):
    """Return a function that changes an adapter's configuration."""
    return lambda folder: change_config(folder, **values)


def test_figures_equal_those_of_the_dense_updates(tmp_path, said):
    model = save_adapter(tmp_path, "rslora")
    figures = said("inspect", tmp_path)
    updates = {
        layer["name"]: model.base_model.model.get_submodule(layer["name"])
        .get_delta_weight("default")
        .detach()
        .double()
        for layer in figures["layers"]
    }
    assert len(updates) == 14
    total = sum(float(update.square().sum()) for update in updates.values())
    for layer in figures["layers"]:
        squares = torch.linalg.svdvals(updates[layer["name"]]).square()[: layer["rank"]]
        parts = squares / squares.sum()
        half = (layer["rank"] + 1) // 2
        assert layer["norm"] == pytest.approx(float(squares.sum().sqrt()), rel=1e-5)
        assert layer["energy_share"] == pytest.approx(float(squares.sum()) / total, rel=1e-5)
        assert layer["kept_by_half"] == pytest.approx(float(parts[:half].sum()), rel=1e-5)
        entropy = -float((parts * parts.clamp(min=1e-30).log()).sum())
        assert layer["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-4)
    trainable, _ = model.get_nb_trainable_parameters()
    assert figures["parameters"] == trainable == sum(row["parameters"] for row in figures["layers"])
    assert sum(row["share"] for row in figures["layers"]) == pytest.approx(1)
    assert {row["name"].rpartition(".")[2]: row["rank"] for row in figures["layers"]}["q_proj"] == 7


def test_the_table_names_layers_and_base_model_without_reading_markup(adapter, capsys):
    change_config(adapter, base_model_name_or_path="[bold]x[/bold]")
    assert main(["inspect", str(adapter)]) == 0
    table = capsys.readouterr().out
    told = "bert.encoder.layer.0.attention.self.query | 16 x 16 | base model: [bold]x[/bold]"
    assert missing(table, told) == []
    assert "34 parameters" in " ".join(table.split())


def test_a_run_folder_is_answered_with_its_adapter(finished, refused):
    assert f"give {finished / 'adapter'}" in refused("inspect", finished)


def weigh(change):
    """Return a function that changes an adapter's tensors, given by name."""

    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)

    return spoil


def tensor(name, value):
    return weigh(lambda tensors: tensors.update({name: value}))


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut_short(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


CONFIG = "adapter_config.json"
BROKEN = {
    "no folder": (lambda f: (f / CONFIG).unlink(), f"{CONFIG} | `save_pretrained`"),
    "no json": (write(CONFIG, b"{"), "must be JSON"),
    "no object": (write(CONFIG, b"[]"), "a list"),
    "too deep": (write(CONFIG, b"[" * 9999), "64 levels"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} | got none"),
    "a pickle": (pickled, "adapter_model.bin, a pickle | safetensors"),
    "cut short": (cut_short, "whole safetensors file | bytes | cut short"),
    "empty": (write(WEIGHTS, b""), "whole safetensors file | 0 bytes"),
    "another method": (configure(peft_type="LOHA"), "`peft_type` | LORA | 'LOHA'"),
    "DoRA": (configure(use_dora=True), "DoRA | `use_dora`"),
    "PiSSA": (configure(init_lora_weights="pissa"), "'pissa' | changes it"),
    "no rank": (configure(r=0), "`r` | at least 1 | got 0"),
    "no alpha": (configure(lora_alpha="8"), "`lora_alpha` | got '8'"),
    "no pattern": (configure(rank_pattern={"(": 4}), "`rank_pattern` | '('"),
    "no end": (configure(rank_pattern={"(.|.)*[^a-z]": 4}), "`rank_pattern` | 0.05 s"),
    "too large": (configure(lora_alpha=1e39), "`lora_alpha` | float32"),
    "too many digits": (configure(r=10**400), "whole number beyond"),
    "another rank": (configure(r=5), "layer.0 | rank | 5 | (4, 16)"),
    "a missing half": (weigh(lambda t: t.pop(f"{QUERY}.lora_B.weight")), "query' | no lora_B"),
    "shapes": (
        tensor(f"{QUERY}.lora_B.weight", torch.zeros(16, 3)),
        "self.query' | (4, 16) | (16, 3)",
    ),
    "an axis": (tensor(f"{QUERY}.lora_A.weight", torch.zeros(4)), "query | (4,)"),
    "numbers": (
        tensor(f"{QUERY}.lora_A.weight", torch.zeros(4, 16, dtype=torch.int8)),
        "floating point | int8",
    ),
    "not finite": (
        tensor(f"{QUERY}.lora_A.weight", torch.tensor([[math.nan, math.inf, *[1.0] * 14]] * 4)),
        "must be finite | got 8 of 64 | query",
    ),
    "a magnitude": (
        tensor(f"{QUERY}.lora_magnitude_vector", torch.ones(16)),
        "lora_magnitude_vector",
    ),
    "no layer": (
        weigh(lambda t: [t.pop(key) for key in list(t) if "lora_" in key]),
        "got none of them",
    ),
    "a long tensor name": (
        tensor(f"{LONG}.lora_A.weight", torch.zeros(4, 16)),
        "tensor's name | at most 2000 characters | 1000014",
    ),
    "a long base model": (
        configure(base_model_name_or_path=LONG),
        "`base_model_name_or_path` | at most 2000 characters | got 1000000",
    ),
    "a long method": (configure(peft_type=LONG), "LORA | not LoRA"),
    "a long text for patterns": (configure(rank_pattern=LONG), "`rank_pattern` must map names"),
    "a long pattern": (configure(rank_pattern={LONG: 0}), "rank_pattern"),
}  # fmt: skip
"""By name, a function that breaks the folder of an adapter, and parts of the error."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_in_one_line(name, adapter, saved_adapter, refused):
    spoil, told = BROKEN[name]
    spoil(adapter)
    made = adapter / "made"
    for words in (
        ["inspect", adapter], ["diff", saved_adapter, adapter],
        ["combine", saved_adapter, adapter, "--output", made],
    ):  # fmt: skip
        line = refused(*words)
        assert len(line) < 5000
        assert missing(line, told) == []
