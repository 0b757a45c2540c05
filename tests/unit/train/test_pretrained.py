"""The pretrained model and its tokenizer, from a folder, a package or a GGUF file."""

import io
import json
from functools import partial

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

from dynlora.errors import ConfigError
from dynlora.train.config import DataConfig, ModelConfig
from dynlora.train.methods.adapter import add_adapter
from dynlora.train.pretrained import check_length, load_model, load_tokenizer, locate
from tests.gguf_files import TOKENS, llama, save_bogus_gguf, save_gguf
from tests.jobs import minimal_job, save_model
from tests.models import bare_llama
from tests.strange_models import drop_weights, put_code_beside, reconfigure
from tests.towers import save_towers


def at(folder, **held):
    return locate(ModelConfig(path=str(folder), **held))


def load_classifier(source, labels):
    return load_model(AutoModelForSequenceClassification, source, num_labels=labels)


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch, model):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights").symlink_to(model)
    monkeypatch.syspath_prepend(tmp_path)
    assert locate(ModelConfig(package="some_package/weights")).place == str(package / "weights")
    with pytest.raises(ConfigError, match=rf"{package / 'other'}, which has no config\.json"):
        locate(ModelConfig(package="some_package/other"))


@pytest.mark.parametrize("package", ["no_such_package/model", "json.decoder/x", "/"])
def test_a_package_that_is_not_installed_is_named(package):
    name = package.partition("/")[0]
    with pytest.raises(ConfigError, match=f"got '{name}', which is not installed"):
        locate(ModelConfig(package=package))


def test_the_lowest_limit_of_model_and_tokenizer_counts(tmp_path):
    save_model(tmp_path)
    assert load_tokenizer(at(tmp_path), 32)
    reconfigure(tmp_path, max_position_embeddings=20)
    with pytest.raises(ConfigError, match=r"must be at most 20, .* got 21"):
        load_tokenizer(at(tmp_path), 21)
    model = bare_llama()
    limit = model.config.max_position_embeddings
    check_length(model, DataConfig(name="d", max_length=limit))
    with pytest.raises(ConfigError, match=f"at most {limit}, the longest input of a Llama"):
        check_length(model, DataConfig(name="d", max_length=limit + 1))


def test_the_limit_of_a_models_text_part_counts(tmp_path):
    save_towers(tmp_path, "CLIP")
    texts = json.loads((tmp_path / "config.json").read_text())["text_config"]
    reconfigure(tmp_path, text_config=texts | {"max_position_embeddings": 20})
    with pytest.raises(ConfigError, match=r"must be at most 20, .* got 21"):
        load_tokenizer(at(tmp_path), 21)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_configured_type_in_memory(tmp_path, dtype):
    save_model(tmp_path)
    half = BertModel.from_pretrained(tmp_path, dtype="bfloat16")
    half.save_pretrained(tmp_path)
    loaded = load_classifier(at(tmp_path, dtype=dtype), 2)
    assert {str(parameter.dtype) for parameter in loaded.parameters()} == {f"torch.{dtype}"}
    assert loaded.name_or_path == str(tmp_path)


@pytest.mark.parametrize(
    ("dropped", "values", "told"),
    [
        ([], {"hidden_size": 32}, r"3\d of its 41 .*another model"),
        ([], {"num_hidden_layers": 9}, r"1\d\d of its 153 weights"),
        (["bert.pooler.dense.bias"], {}, r"1 of its 41 weights .* 'bert\.pooler\.dense\.bias'"),
    ],
)
def test_files_of_another_model_or_without_some_weights_are_refused(
    tmp_path, dropped, values, told
):
    save_model(tmp_path)
    drop_weights(tmp_path, *dropped)
    reconfigure(tmp_path, **values)
    with pytest.raises(ConfigError, match=told):
        load_classifier(at(tmp_path), 2)


def test_a_language_model_must_bring_its_output_layer(tmp_path):
    bare_llama().save_pretrained(tmp_path)
    drop_weights(tmp_path, "lm_head")
    with pytest.raises(ConfigError, match=r"1 of its 21 weights .* 'lm_head\.weight'"):
        load_model(AutoModelForCausalLM, at(tmp_path))


def test_a_new_pooler_of_a_quantized_model_is_told_and_trained_whole(tmp_path, caplog):
    save_model(tmp_path, hidden=64)
    drop_weights(tmp_path, "bert.pooler")
    loaded = load_classifier(at(tmp_path, quantization="int8"), 2)
    (note,) = [record.getMessage() for record in caplog.records if record.name[:7] == "dynlora"]
    assert note.startswith(f"the files of {tmp_path} have no weights for bert.pooler,")
    job = minimal_job(method="lora", lora={"r": 2, "target_modules": ["dense"]})
    model = add_adapter(loaded, job)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("bert.pooler.modules_to_save" in name for name in trained) == 2
    assert not any("pooler" in name and "lora" in name for name in trained)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.tensor([[2, 5, 7, 3]])
    torch.manual_seed(99)
    again = load_classifier(at(tmp_path, quantization="int8"), 2)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        assert torch.allclose(again(input_ids=tokens).logits, expected, atol=1e-5)


def test_code_beside_a_model_never_runs(tmp_path, monkeypatch):
    save_model(tmp_path / "m")
    put_code_beside(tmp_path / "m", tmp_path / "ran")
    source = at(tmp_path / "m", quantization="nf4")
    loaders = (
        lambda: load_tokenizer(source, 8),
        lambda: load_classifier(source, 2),
        lambda: load_model(AutoModelForCausalLM, at(tmp_path / "m")),
    )
    for load in loaders:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        with pytest.raises(ConfigError, match=f"{tmp_path / 'm'} could not be loaded: "):
            load()
    assert not (tmp_path / "ran").exists()


LOADERS = (partial(load_tokenizer, max_length=16), partial(load_model, AutoModelForCausalLM))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama(), TOKENS)


def source_of(file):
    return at(file.parent, gguf_file=file.name)


def test_a_gguf_file_gives_the_same_model_and_tokenizer(file, tmp_path):
    tokenizer, loaded = (load(source=source_of(file)) for load in LOADERS)
    ids = tokenizer("abcl", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[15, 5, 14]]
    assert tokenizer.eos_token == "<|endoftext|>"
    assert loaded.name_or_path == str(file)
    with torch.no_grad():
        expected, found = llama()(ids).logits, loaded.eval()(ids).logits
    assert torch.allclose(expected, found, atol=1e-5)
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in llama().state_dict().items():
        assert torch.allclose(again.state_dict()[name], weight, atol=1e-6), name


def test_a_length_or_a_name_beyond_the_file_is_refused(file):
    with pytest.raises(ConfigError, match=r"at most 64, .*tiny\.gguf, got 65"):
        load_tokenizer(source_of(file), 65)
    told = rf"a file in {file.parent}, got 'big\.gguf'.* files are: tiny\.gguf"
    with pytest.raises(ConfigError, match=told):
        source_of(file.with_name("big.gguf"))


@pytest.mark.parametrize("kept", [5, 500, 20000, -1])
def test_a_file_that_ends_too_early_is_refused(tmp_path, file, kept):
    (tmp_path / "m.gguf").write_bytes(file.read_bytes()[:kept])
    for load in LOADERS:
        with pytest.raises(ConfigError, match=r"m\.gguf must be a whole GGUF file .* cut short"):
            load(source=source_of(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("bogus", "ValueError: GGUF model with architecture bogus is not"),
        ("llama", r"m\.gguf must be a whole GGUF file"),  # without its keys
    ],
)
def test_a_file_that_transformers_cannot_use_is_refused(tmp_path, architecture, told):
    save_bogus_gguf(tmp_path / "m.gguf", architecture)
    with pytest.raises(ConfigError, match=told):
        load_tokenizer(source_of(tmp_path / "m.gguf"), 16)
