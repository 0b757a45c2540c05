"""`dynlora extract`: the adapter of a full fine-tune, which stock PEFT loads on the base model."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
)

from dynlora.cli.main import main
from tests.jobs import save_model
from tests.language import save_language_model

TUNED_RANK = 3


@torch.no_grad()
def tune(model, *, rank=TUNED_RANK, size=0.05, kinds=(nn.Linear, nn.Embedding)):
    """Add a random update of a rank to each matrix of the model."""
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, kinds):
            rows, columns = module.weight.shape
            module.weight += size * torch.randn(rows, rank) @ torch.randn(rank, columns)
    return model


def logits(model, words=16):
    ids = torch.randint(4, 12, (4, words), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model.eval()(input_ids=ids, **more).logits


@pytest.fixture
def extracted(said, tmp_path):
    return lambda base, tuned, *options: said(
        "extract", base, tuned, "--output", tmp_path / "made", *options
    )


# PEFT warns of tied weights, which only merging would have to untie.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_the_adapter_of_a_language_model_restores_the_tuned_model(tied, extracted, tmp_path):
    base = save_language_model(tmp_path / "base")
    if tied:
        config = AutoConfig.from_pretrained(base, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tuned = tune(AutoModelForCausalLM.from_pretrained(base))
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1, "read from shards"
    found = extracted(base, tmp_path / "tuned", "--error", "0.001")
    layers = {layer["name"]: layer["rank"] for layer in found["layers"]}
    # The tuned weight that two layers share got two updates.
    assert set(layers.values()) == ({TUNED_RANK, 2 * TUNED_RANK} if tied else {TUNED_RANK})
    assert {"lm_head", "model.embed_tokens"} <= set(layers)
    assert all(layer["lost"] < 1e-3 for layer in found["layers"])
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "made"
    )
    assert loaded.peft_config["default"].task_type == "CAUSAL_LM"
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-4, atol=1e-4)


SIZES = {"vocab_size": 16, "d_model": 16, "decoder_start_token_id": 0}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        T5Config(d_kv=8, d_ff=32, num_layers=1, num_heads=2, **SIZES),
        BartConfig(
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_position_embeddings=16, scale_embedding=True, **SIZES,
        ),
    ],
    ids=["t5", "bart"],
)  # fmt: skip
def test_embeddings_of_one_weight_are_restored_wherever_they_are_used(config, extracted, tmp_path):
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "base")
    tuned = tune(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base"))
    tuned.save_pretrained(tmp_path / "tuned")
    left_out = extracted(tmp_path / "base", tmp_path / "tuned")["left_out"]
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    # BART's positions are embedded with a forward that PEFT's LoRA does not have.
    positions = [name for name in base.state_dict() if name.endswith("embed_positions.weight")]
    assert sorted(left_out) == sorted(positions)
    for name in positions:
        tuned.get_parameter(name).data = base.get_parameter(name).data.clone()
    loaded = PeftModel.from_pretrained(base, tmp_path / "made")
    told = logits(tuned)
    torch.testing.assert_close(logits(loaded), told, rtol=1e-4, atol=1e-4)
    merge = ["export", tmp_path / "made", "--format", "merged", "--output", tmp_path / "merged"]
    assert main([str(word) for word in merge]) == 0
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), told, rtol=1e-4, atol=1e-4)


def test_an_output_layer_is_extracted_once_if_the_files_have_its_weight(extracted, tmp_path):
    base = save_language_model(tmp_path / "base")
    tune(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "tuned")
    path = tmp_path / "tuned" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    names = [layer["name"] for layer in extracted(base, tmp_path / "tuned")["layers"]]
    assert names.count("lm_head") == 1


def test_a_classifier_is_saved_whole_and_other_changes_are_reported(extracted, tmp_path):
    whole = save_model(tmp_path / "whole")
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "base")  # without a classifier
    tuned = tune(AutoModelForSequenceClassification.from_pretrained(whole))
    with torch.no_grad():
        tuned.bert.encoder.layer[1].output.LayerNorm.bias += 1
    tuned.save_pretrained(tmp_path / "tuned")
    found = extracted(tmp_path / "base", tmp_path / "tuned")
    assert list(found["left_out"]) == ["bert.encoder.layer.1.output.LayerNorm.bias"]
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "made")
    with torch.no_grad():
        tuned.bert.encoder.layer[1].output.LayerNorm.bias -= 1
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-4, atol=1e-4)


def test_a_pooler_that_the_base_lacks_is_saved_without_the_rest_of_the_model(extracted, tmp_path):
    whole = save_model(tmp_path / "whole")
    BertForMaskedLM.from_pretrained(whole).save_pretrained(tmp_path / "base")  # without a pooler
    tuned = tune(AutoModelForSequenceClassification.from_pretrained(whole))
    tuned.save_pretrained(tmp_path / "tuned")
    path = tmp_path / "tuned" / "model.safetensors"
    buffer = {"bert.embeddings.position_ids": torch.arange(4)[None]}  # of older transformers
    save_file(load_file(path) | buffer, path, metadata={"format": "pt"})
    assert extracted(tmp_path / "base", tmp_path / "tuned")["left_out"] == {}
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "made")
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-4, atol=1e-4)


def test_transposed_weights_are_extracted(extracted, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tuned = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    kind = type(tuned.transformer.h[0].mlp.c_fc)
    tune(tuned, kinds=(kind,)).save_pretrained(tmp_path / "tuned")
    extracted(tmp_path / "base", tmp_path / "tuned")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "made")
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-4, atol=1e-4)


def test_lost_is_the_part_of_the_change_that_is_not_in_the_adapter(extracted, tmp_path):
    base = save_language_model(tmp_path / "base")
    tuned = tune(AutoModelForCausalLM.from_pretrained(base), rank=8)
    tuned.save_pretrained(tmp_path / "tuned")
    found = extracted(base, tmp_path / "tuned", "--rank", "2")
    before = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "made"
    )
    merged = loaded.merge_and_unload()
    for layer in found["layers"]:
        assert 1 <= layer["rank"] <= 2
        start, made, wanted = (
            model.get_submodule(layer["name"]).weight.detach() for model in (before, merged, tuned)
        )
        lost = float((wanted - made).norm() / (wanted - start).norm())
        assert layer["lost"] == pytest.approx(lost, abs=1e-3)


def test_models_that_do_not_fit_are_refused(refused, tmp_path):
    base = save_language_model(tmp_path / "base")
    wide = save_language_model(tmp_path / "wide", hidden=64)
    pickled = save_language_model(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    strange = save_language_model(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"architectures": ["os"]}))
    cut = save_language_model(tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-100])
    hurt = save_language_model(tmp_path / "hurt")
    tensors = load_file(hurt / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, hurt / "model.safetensors", metadata={"format": "pt"})
    for tuned, told in (
        (base, "equal weights"),
        (wide, "instead of"),
        (pickled, "safetensors"),
        (strange, "'os'"),
        (cut, "safetensors"),
        (hurt, "model.norm.weight"),
    ):
        line = refused("extract", base, tuned, "--output", tmp_path / "made")
        assert told in line, line
