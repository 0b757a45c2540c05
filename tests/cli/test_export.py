"""`dynlora export`: stock PEFT and stock transformers, which load the results, are the oracles."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dynlora.cli.main import main
from tests.adapters import (
    assert_close,
    change_config,
    load_adapter,
    outputs,
    randomised,
    save_adapter,
    save_classifier_adapter,
)
from tests.jobs import missing, save_model
from tests.models import bare_llama


@pytest.fixture
def error(refused):
    return lambda output, *arguments: refused("export", *arguments, "--output", output)


def export(folder, output, *options):
    assert main(["export", str(folder), "--output", str(output), *map(str, options)]) == 0
    return output


@torch.no_grad()
def classify(model):
    tokens = torch.randint(4, 15, (4, 9), generator=torch.Generator().manual_seed(3))
    return model.eval()(input_ids=tokens).logits


def test_uniform_keeps_the_function_at_the_requested_rank(tmp_path, said, capsys):
    given = outputs(save_adapter(tmp_path / "given", "rslora"))
    options = ("--format", "uniform", "--rank", 9, "--output", tmp_path / "made")
    rows = said("export", tmp_path / "given", *options)["layers"]
    assert_close(outputs(load_adapter(tmp_path / "made", "rslora")), given)
    assert {row["rank_after"] for row in rows} == {9}
    made = sum(row["parameters"] for row in rows)
    before = sum(row["parameters"] * row["rank_before"] // row["rank_after"] for row in rows)
    export(tmp_path / "given", tmp_path / "again", "--format", "uniform", "--rank", 9)
    told = f"note: the result has {made / before:.1f} times the parameters"
    assert told in capsys.readouterr().err


def test_a_merged_classifier_is_a_plain_model_with_the_adapters_head(model, tmp_path):
    given = classify(save_classifier_adapter(tmp_path / "adapter", model, labels=5))
    made = export(tmp_path / "adapter", tmp_path / "made", "--format", "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(made)
    assert merged.config.num_labels == 5
    assert_close(classify(merged), given)
    assert not list(made.glob("adapter*"))
    words = "red round cat"
    assert AutoTokenizer.from_pretrained(made)(words) == AutoTokenizer.from_pretrained(model)(words)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_merged_embedding_changes_the_input_alone(tied, tmp_path):
    base = bare_llama()
    base.config.tie_word_embeddings = tied
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"])
    made = randomised(get_peft_model(base, config))
    given = outputs(made)
    made.save_pretrained(tmp_path / "adapter")
    merged = export(tmp_path / "adapter", tmp_path / "made", "--format", "merged")
    assert_close(outputs(AutoModelForCausalLM.from_pretrained(merged).eval()), given)


def test_the_command_line_decides_on_the_base_model(model, adapter, tmp_path, error):
    change_config(adapter, base_model_name_or_path="someone/somewhere")
    options = (adapter, "--format", "merged")
    save_model(tmp_path / "other", hidden=24)
    bare_llama().save_pretrained(tmp_path / "llama")
    for given, told in (
        ([], "names someone/somewhere | `--model`"),
        (["other"], "bert.encoder.layer.0 | (24, 24) instead of (16, 16)"),
        (["llama"], "no module 'bert.encoder.layer.0"),
    ):
        base = [word for name in given for word in ("--model", tmp_path / name)]
        assert missing(error(tmp_path / "made", *options, *base), told) == []
    made = export(adapter, tmp_path / "made", "--format", "merged", "--model", model)
    base, merged = map(AutoModelForSequenceClassification.from_pretrained, (model, made))
    assert_close(classify(merged), classify(PeftModel.from_pretrained(base, adapter)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--format", "uniforn"], "'uniforn' | uniform"),
        (["--format", "uniform", "--rank", 3], "highest rank, which is 4 | got 3"),
        (["--format", "uniform", "--rank", 0], "'--rank' | 0 is not in the range"),
        (["--format", "native", "--rank", 8], "`--rank` | uniform | native"),
        (["--format", "uniform", "--model", "x"], "`--model` | merged"),
        (["--format", "merged", "--model", "missing.gguf"], "GGUF | missing.gguf"),
        ([], "--format"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, told, adapter, tmp_path, error):
    assert missing(error(tmp_path / "made", adapter, *options), told) == []


def test_the_output_of_a_broken_adapter_and_an_existing_output_are_left_alone(
    adapter, tmp_path, error
):
    (tmp_path / "file").write_text("mine")
    for output, told in (
        (adapter, "contains"), (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "made", "is a file"), ("..", "the name of a folder"),
    ):  # fmt: skip
        assert told in error(output, adapter, "--format", "native")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert "0 bytes" in error(tmp_path / "made", adapter, "--format", "uniform")


def test_a_tokenizer_is_copied_and_a_link_is_not_followed(adapter, model, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(tmp_path / "secret")
    shutil.copy(model / "tokenizer_config.json", adapter)
    made = export(adapter, tmp_path / "made", "--format", "native")
    assert not (made / "README.md").exists()
    copied = (made / "tokenizer_config.json").read_bytes()
    assert copied == (model / "tokenizer_config.json").read_bytes()


def test_a_run_whose_model_has_a_relative_path_is_merged_from_anywhere(
    train, model, output, tmp_path, monkeypatch
):
    monkeypatch.chdir(model.parent)
    assert train("--model.path", model.name, "--training.max_steps", 2) == 0
    monkeypatch.chdir(tmp_path)
    export(output / "adapter", tmp_path / "merged", "--format", "merged")
    assert (tmp_path / "merged" / "config.json").is_file()


def test_mlx_factors_multiply_inputs_to_pefts_update_at_one_rank(tmp_path):
    model = save_adapter(tmp_path / "given", "rslora")
    made = tmp_path / "made"
    assert main(["export", str(tmp_path / "given"), "--format", "mlx", "--output", str(made)]) == 0
    config = json.loads((made / "adapter_config.json").read_text())
    lora, factors = config["lora_parameters"], load_file(made / "adapters.safetensors")
    assert config["fine_tune_type"] == "lora"
    layers = {name.rpartition(".")[0] for name in factors}
    assert len(layers) * 2 == len(factors)
    for name in layers:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        assert a.shape[1] == len(b) == lora["rank"]
        update = model.base_model.model.get_submodule(name).get_delta_weight("default")
        x = np.random.default_rng(0).normal(size=(3, len(a)))
        np.testing.assert_allclose(
            x @ a @ b * lora["scale"], x @ update.detach().numpy().T, rtol=0, atol=1e-5
        )
    # MLX-LM replaces the modules of these names in every block, and no other.
    assert set(lora["keys"]) == {name.split(".", 3)[3] for name in layers}
    assert config["num_layers"] == -1


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("embedding", "an embedding, model.embed_tokens"),
        ("head kept", "lm_head.weight of `modules_to_save`"),
        ("bias", "a bias of lora_B"),
        ("convolutions", "a convolution, conv1"),
        ("transposed", "`model.layers.N` | transformer.h.0.attn.c_attn"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias for a sharded factor
def test_an_adapter_that_mlx_cannot_hold_is_refused_by_name(case, told, tmp_path, refused):
    save_adapter(tmp_path / "given", case)
    made = tmp_path / "made"
    error = refused("export", tmp_path / "given", "--format", "mlx", "--output", made)
    assert missing(error, f"{told} | linear layers | --format merged") == []
    assert not made.exists()
