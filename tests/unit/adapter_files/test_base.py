"""The base model of a saved adapter: found, loaded in the form it was trained in, refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dynlora.adapter_files.adapter import read_adapter
from dynlora.adapter_files.base import attach, load_base, locate_base
from dynlora.adapter_files.merge import Companion, merge_adapter
from dynlora.errors import AdapterError
from tests.adapters import randomised, save_classifier_adapter
from tests.gguf_files import save_bogus_gguf, save_gguf
from tests.models import bare_llama
from tests.pictures import SIDE, save_vit
from tests.strange_models import drop_weights

ROBERTA = RobertaConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=16, pad_token_id=1,
)  # fmt: skip
BART = BartConfig(
    vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16,
)  # fmt: skip
TOKENS = ["<|endoftext|>", "<s>", "<pad>", *"abcdefghijkl", "ab"]


def configure(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return read_adapter(folder)


def save(folder, base, **lora):
    """Save a random adapter and return its model."""
    made = randomised(get_peft_model(base, LoraConfig(r=3, **lora)))
    made.save_pretrained(folder)
    return made


def test_an_adapter_from_elsewhere_does_not_decide_what_is_downloaded(model, tmp_path):
    save_classifier_adapter(tmp_path, model)
    adapter = configure(tmp_path, base_model_name_or_path="someone/model")
    with pytest.raises(AdapterError, match=r"names someone/model, which is no folder .*`--model`"):
        locate_base(adapter, None)
    assert locate_base(adapter, "someone/other").place == "someone/other"
    for name in ("../../etc", "a/b/c", "", "x" * 300):
        with pytest.raises(AdapterError, match=r"base model must be known"):
            locate_base(configure(tmp_path, base_model_name_or_path=name), None)


def test_a_hub_model_that_was_downloaded_before_is_found_and_nothing_else_is(
    model, tmp_path, monkeypatch
):
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((model / "config.json").read_bytes())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    save_classifier_adapter(tmp_path / "adapter", model)
    adapter = configure(tmp_path / "adapter", base_model_name_or_path="someone/model")
    source = locate_base(adapter, None)
    assert source.place == "someone/model"
    assert source.options["local_files_only"] is True


def test_code_that_lies_beside_a_base_model_never_runs(model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    save_classifier_adapter(tmp_path / "adapter", model)
    adapter = read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="base could not be loaded"):
        load_base(adapter, locate_base(adapter, str(base)))
    assert not (tmp_path / "ran").exists()


def test_a_class_that_is_no_model_is_never_called(model, tmp_path):
    save_classifier_adapter(tmp_path, model)
    for name in ("TrainingArguments", "os", "utils.logging", "Trainer"):
        mapping = {"base_model_class": name, "parent_library": "transformers"}
        adapter = configure(tmp_path, task_type=None, auto_mapping=mapping)
        with pytest.raises(AdapterError, match=f"class of transformers, got '{name}'"):
            load_base(adapter, locate_base(adapter, None))


def test_without_a_task_the_class_that_peft_noted_is_taken(model, tmp_path):
    base = BertForSequenceClassification.from_pretrained(model)
    save(tmp_path, base, target_modules=["query"])
    adapter = read_adapter(tmp_path)
    assert adapter.config["task_type"] is None
    assert type(load_base(adapter, locate_base(adapter, None))) is BertForSequenceClassification


def test_tensors_that_peft_would_leave_at_their_first_values_are_an_error(model, tmp_path):
    save_classifier_adapter(tmp_path, model)
    adapter = configure(tmp_path, target_modules=["query", "value", "dense", "key"])
    with pytest.raises(AdapterError, match=r"must load on its base model.*missing.*key\.lora_A"):
        attach(adapter, load_base(adapter, locate_base(adapter, None)))


@torch.no_grad()
def test_an_adapter_of_a_gguf_file_is_merged_into_a_plain_folder(tmp_path):
    bare_llama().save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    file = save_gguf(tmp_path / "tiny.gguf", plain, TOKENS)
    given = save(tmp_path / "adapter", plain, target_modules=["q_proj", "up_proj"],
                 task_type="CAUSAL_LM")  # fmt: skip
    tokens = torch.randint(0, 16, (3, 9))
    expected = given(tokens).logits
    adapter = read_adapter(tmp_path / "adapter")
    made = merge_adapter(adapter, locate_base(adapter, str(file)), tmp_path / "made", {})
    assert made == Companion("tokenizer", saved=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    assert type(merged) is LlamaForCausalLM
    assert "quantization_config" not in merged.config.to_dict()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "made").convert_ids_to_tokens([3]) == ["a"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00\xff\xff", b"no gguf"])
def test_a_gguf_file_that_cannot_be_read_is_refused_by_name(content, tmp_path):
    save(tmp_path / "adapter", bare_llama(), target_modules=["q_proj"], task_type="CAUSAL_LM")
    (tmp_path / "cut.gguf").write_bytes(content)
    adapter = read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"cut\.gguf could not be loaded"):
        load_base(adapter, locate_base(adapter, str(tmp_path / "cut.gguf")))


def test_a_gguf_file_of_an_unknown_architecture_is_refused_with_its_name(tmp_path):
    save(tmp_path / "adapter", bare_llama(), target_modules=["q_proj"], task_type="CAUSAL_LM")
    file = save_bogus_gguf(tmp_path / "odd.gguf")
    adapter = read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"odd\.gguf could not be loaded: .*bogus"):
        load_base(adapter, locate_base(adapter, str(file)))


def save_image_adapter(folder, base_folder):
    """Save a ViT with its processor, and an adapter of it with a head of three classes."""
    save_vit(base_folder)
    base = AutoModelForImageClassification.from_pretrained(
        base_folder, num_labels=3, ignore_mismatched_sizes=True
    )
    linear = [name for name, m in base.named_modules() if type(m) is torch.nn.Linear]
    targets = [name for name in linear if name != "classifier"]
    return save(folder, base, target_modules=targets, modules_to_save=["classifier"])


@torch.no_grad()
def test_a_model_of_images_is_merged_with_its_preprocessing(tmp_path):
    given = save_image_adapter(tmp_path / "adapter", tmp_path / "base")
    pixels = torch.randn(2, 3, SIDE, SIDE)
    expected = given(pixels).logits
    adapter = read_adapter(tmp_path / "adapter")
    made = merge_adapter(adapter, locate_base(adapter, None), tmp_path / "made", {})
    assert made == Companion("image processor", saved=True)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "made").eval()
    torch.testing.assert_close(merged(pixels).logits, expected, rtol=0, atol=1e-5)
    before, after = (
        json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        for name in ("base", "made")
    )
    assert after == before


@pytest.mark.parametrize(
    ("form", "config", "head", "outputs"),
    [
        (RobertaForSequenceClassification, ROBERTA, "classifier", 40),
        (RobertaForSequenceClassification, ROBERTA, "classifier", 3),
        (BartForSequenceClassification, BART, "classification_head", 5),
    ],
)
def test_a_head_of_several_layers_has_the_outputs_of_its_last(
    form, config, head, outputs, tmp_path
):
    form(config).save_pretrained(tmp_path / "base")
    base = form.from_pretrained(tmp_path / "base", num_labels=outputs, ignore_mismatched_sizes=True)
    save(tmp_path / "adapter", base, target_modules=["q_proj", "query"], modules_to_save=[head])
    adapter = read_adapter(tmp_path / "adapter")
    merge_adapter(adapter, locate_base(adapter, None), tmp_path / "made", {"problem_type": "x"})
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert len(made["id2label"]) == outputs
    assert made["problem_type"] == "x"


def cached(folder, hub, name):
    """Put a model's files where those of a hub model lie that was downloaded before."""
    store = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, store / "snapshots" / "abc")
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("abc")


def test_the_preprocessing_of_a_model_on_the_hub_is_saved_too(tmp_path, monkeypatch):
    save_image_adapter(tmp_path / "adapter", tmp_path / "base")
    cached(tmp_path / "base", tmp_path / "hub", "someone/vit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapter = configure(tmp_path / "adapter", base_model_name_or_path="someone/vit")
    source = locate_base(adapter, None)
    assert source.place == "someone/vit"
    assert merge_adapter(adapter, source, tmp_path / "made", {}).saved
    made = json.loads((tmp_path / "made" / "preprocessor_config.json").read_text())
    assert made["size"] == {"height": SIDE, "width": SIDE}


def test_a_model_of_images_without_preprocessing_has_no_tokenizer_either(tmp_path):
    save_image_adapter(tmp_path / "adapter", tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    adapter = read_adapter(tmp_path / "adapter")
    made = merge_adapter(adapter, locate_base(adapter, None), tmp_path / "made", {})
    assert made == Companion("image processor", saved=False)


def test_a_base_model_whose_files_lack_weights_is_refused(model, tmp_path):
    base = shutil.copytree(model, tmp_path / "base")
    save_classifier_adapter(tmp_path / "adapter", base)
    adapter = read_adapter(tmp_path / "adapter")
    drop_weights(base, "classifier")
    assert load_base(adapter, locate_base(adapter, None)), "the adapter brings it"
    drop_weights(base, "bert.encoder.layer.1.output")
    with pytest.raises(
        AdapterError, match=r"4 of its 41 weights are missing .* 'bert\.encoder\.layer\.1\.output"
    ):
        load_base(adapter, locate_base(adapter, None))


def test_a_head_that_the_adapter_does_not_bring_must_be_in_the_model(model, tmp_path):
    base = shutil.copytree(model, tmp_path / "base")
    save(tmp_path / "adapter", BertForSequenceClassification.from_pretrained(base),
         target_modules=["query"])  # fmt: skip
    drop_weights(base, "classifier")
    adapter = read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"2 of its 41 weights .* 'classifier\.weight'"):
        load_base(adapter, locate_base(adapter, None))


def test_a_pooler_that_no_head_reads_may_be_missing(model, tmp_path):
    bare = BertModel.from_pretrained(model)
    save(tmp_path / "adapter", bare, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    base = shutil.copytree(model, tmp_path / "base")
    drop_weights(base, "bert.pooler")
    adapter = read_adapter(tmp_path / "adapter")
    assert load_base(adapter, locate_base(adapter, str(base)))
