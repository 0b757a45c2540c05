"""`dynlora export`: stock PEFT and stock transformers, which load what was written, are oracles."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dynlora.cli.main import main
from tests.adapters import load_adapter, outputs, save_adapter, save_classifier_adapter
from tests.cli.bad_adapters import BROKEN
from tests.jobs import save_model
from tests.models import bare_llama


@pytest.fixture
def adapter(model, tmp_path):
    """Return the folder of an adapter with a classifier for two labels, on the tiny BERT."""
    save_classifier_adapter(tmp_path / "adapter", model)
    return tmp_path / "adapter"


@pytest.fixture
def error(capsys):
    """Return a runner that must fail and write nothing; it returns the error's line."""

    def run(output, *arguments):
        before = sorted(output.parent.rglob("*"))
        capsys.readouterr()
        assert main(["export", *map(str, arguments), "--output", str(output)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert captured.err.count("error:") == 1
        assert sorted(output.parent.rglob("*")) == before
        return captured.err

    return run


def export(folder, output, *options):
    assert main(["export", str(folder), "--output", str(output), *map(str, options)]) == 0
    return output


@torch.no_grad()
def classify(model):
    tokens = torch.randint(4, 15, (4, 9), generator=torch.Generator().manual_seed(3))
    return model.eval()(input_ids=tokens).logits


def close(made, given):
    torch.testing.assert_close(made, given, rtol=0, atol=1e-6 * float(given.abs().max()))


@pytest.mark.parametrize("options", [("native",), ("uniform",), ("uniform", "--rank", 9)])
def test_the_function_stays_what_it_was(options, tmp_path, capsys):
    given = outputs(save_adapter(tmp_path / "given", "rslora"))
    made = export(tmp_path / "given", tmp_path / "made", "--format", *options, "--json")
    said = json.loads(capsys.readouterr().out)
    close(outputs(load_adapter(made, "rslora")), given)
    assert {row["energy_kept"] for row in said["layers"]} == {1.0}
    if options[0] == "uniform":
        assert {row["rank"] for row in said["layers"]} == {9 if len(options) > 1 else 7}


def test_svd_uniform_gives_every_layer_its_best_update_of_that_rank(tmp_path, capsys):
    model = save_adapter(tmp_path / "given", "rslora")
    made = export(
        tmp_path / "given", tmp_path / "made", "--format", "svd-uniform", "--rank", 3, "--json"
    )
    said = json.loads(capsys.readouterr().out)
    loaded = load_adapter(made, "rslora")
    for row in said["layers"]:
        update, cut = (
            m.base_model.model.get_submodule(row["name"]).get_delta_weight("default").detach()
            for m in (model, loaded)
        )
        U, S, Vh = torch.linalg.svd(update.double(), full_matrices=False)
        torch.testing.assert_close(cut.double(), U[:, :3] * S[:3] @ Vh[:3], rtol=0, atol=1e-6)
        kept = float(S[:3].square().sum() / S.square().sum())
        assert row["energy_kept"] == pytest.approx(kept, rel=1e-5)
    config = json.loads((made / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})


def test_a_merged_classifier_is_a_plain_model_with_the_adapters_head(model, adapter, tmp_path):
    with_adapter = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(model), adapter
    )
    given = classify(with_adapter)
    made = export(adapter, tmp_path / "made", "--format", "merged")
    close(classify(AutoModelForSequenceClassification.from_pretrained(made)), given)
    assert not list(made.glob("adapter*"))
    words = "red round cat"
    assert AutoTokenizer.from_pretrained(made)(words) == AutoTokenizer.from_pretrained(model)(words)


def test_the_head_decides_how_many_labels_a_merged_classifier_has(model, tmp_path):
    given = classify(save_classifier_adapter(tmp_path / "adapter", model, labels=5))
    made = export(tmp_path / "adapter", tmp_path / "made", "--format", "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(made)
    assert merged.config.num_labels == 5
    close(classify(merged), given)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_merged_embedding_changes_the_input_alone(tied, tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.adapters import randomised

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
    close(outputs(AutoModelForCausalLM.from_pretrained(merged).eval()), given)


def test_a_base_model_that_moved_is_named_on_the_command_line(model, adapter, tmp_path, error):
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {
        "base_model_name_or_path": "someone/somewhere"}))  # fmt: skip
    line = error(tmp_path / "made", adapter, "--format", "merged")
    assert "names someone/somewhere" in line
    assert "`--model`" in line
    made = export(adapter, tmp_path / "made", "--format", "merged", "--model", model)
    assert (made / "model.safetensors").is_file()


def test_an_adapter_of_another_model_is_refused_with_layer_and_shapes(adapter, tmp_path, error):
    other = save_model(tmp_path / "other", hidden=24)
    line = error(tmp_path / "made", adapter, "--format", "merged", "--model", other)
    assert "bert.encoder.layer.0.attention.self.query" in line or "layer.0" in line
    assert "(24, 24)" in line
    assert "(16, 16)" in line
    bare_llama().save_pretrained(tmp_path / "llama")
    line = error(tmp_path / "made", adapter, "--format", "merged", "--model", tmp_path / "llama")
    assert "no module 'bert.encoder.layer.0" in line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--format", "uniforn"], ["'uniforn'", "svd-uniform"]),
        (["--format", "uniform", "--rank", 3], ["highest rank, which is 4", "got 3"]),
        (["--format", "svd-uniform"], ["`--rank"]),
        (["--format", "svd-uniform", "--rank", 0], ["`--rank`", "at least 1", "got 0"]),
        (["--format", "native", "--rank", 8], ["`--rank`", "uniform or svd-uniform", "native"]),
        (["--format", "uniform", "--model", "x"], ["`--model`", "merged"]),
        (["--format", "merged", "--model", "missing.gguf"], ["GGUF", "missing.gguf"]),
        ([], ["--format"]),
    ],
)
def test_options_that_do_not_go_together_are_named(options, told, adapter, tmp_path, error):
    line = error(tmp_path / "made", adapter, *options)
    for part in told:
        assert part in line


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_and_nothing_is_written(name, adapter, tmp_path, error):
    spoil, told = BROKEN[name]
    spoil(adapter)
    line = error(tmp_path / "made", adapter, "--format", "uniform")
    for part in told:
        assert part in line


def test_an_output_that_holds_anything_is_left_alone(adapter, tmp_path, error):
    given = {path: path.read_bytes() for path in adapter.iterdir()}
    assert "which holds" in error(adapter, adapter, "--format", "native")
    (tmp_path / "file").write_text("mine")
    assert "is a file" in error(tmp_path / "file", adapter, "--format", "native")
    assert "is a file" in error(tmp_path / "file" / "made", adapter, "--format", "native")
    assert {path: path.read_bytes() for path in adapter.iterdir()} == given
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_in_an_adapter_from_elsewhere_is_not_followed(adapter, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(tmp_path / "secret")
    made = export(adapter, tmp_path / "made", "--format", "native")
    assert not (made / "README.md").exists()


def test_a_tokenizer_beside_the_weights_goes_with_them(adapter, model, tmp_path):
    shutil.copy(model / "tokenizer_config.json", adapter)
    made = export(adapter, tmp_path / "made", "--format", "native")
    assert (made / "tokenizer_config.json").read_bytes() == (
        model / "tokenizer_config.json"
    ).read_bytes()


def test_a_run_whose_model_lay_in_a_relative_path_is_merged_from_anywhere(
    model, job, output, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(model.parent)
    assert main(["train", str(job), "--model.path", model.name, "--training.max_steps", "2"]) == 0
    monkeypatch.chdir(tmp_path)
    export(output / "adapter", tmp_path / "merged", "--format", "merged")
    assert (tmp_path / "merged" / "config.json").is_file()
