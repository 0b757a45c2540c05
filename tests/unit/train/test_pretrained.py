"""The pretrained model and its tokenizer."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)

from dynlora.errors import ConfigError
from dynlora.train.config import DataConfig, JobConfig, LoraSettings, ModelConfig
from dynlora.train.methods.adapter import add_adapter
from dynlora.train.pretrained import Source, load_model, load_tokenizer, locate
from tests.jobs import save_model, save_tokenizer
from tests.models import bare_llama
from tests.strange_models import drop_weights, put_code_beside, reconfigure


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def at(folder: Path, **held: Any) -> Source:
    return locate(ModelConfig(path=str(folder), **held))


def load_classifier(source: Source, labels: int) -> Any:
    return load_model(AutoModelForSequenceClassification, source, num_labels=labels)


def test_a_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights").symlink_to(model)
    monkeypatch.syspath_prepend(tmp_path)
    assert locate(ModelConfig(package="some_package/weights")).place == str(package / "weights")
    with pytest.raises(ConfigError, match=rf"{package / 'other'}, which has no config\.json"):
        locate(ModelConfig(package="some_package/other"))


@pytest.mark.parametrize("package", ["no_such_package/model", "json.decoder/x", "/"])
def test_a_package_that_is_not_installed_is_named(package: str) -> None:
    name = package.partition("/")[0]
    with pytest.raises(ConfigError, match=f"got '{name}', which is not installed"):
        locate(ModelConfig(package=package))


@pytest.mark.parametrize(("labels", "kept"), [(2, True), (5, False)])
def test_a_classifier_is_kept_where_it_fits_and_else_newly_drawn(
    model: Path, labels: int, kept: bool
) -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        loaded = load_classifier(at(model), labels)
        drawn.append(loaded.classifier.weight)
    assert drawn[0].shape == (labels, 16)
    assert torch.equal(drawn[0], drawn[1]), "the same random state gives the same classifier"
    torch.manual_seed(8)
    other = load_classifier(at(model), labels).classifier.weight
    assert torch.equal(drawn[0], other) == kept


def test_weights_in_half_precision_are_loaded_in_float32(tmp_path: Path, model: Path) -> None:
    BertModel(BertConfig.from_pretrained(model)).bfloat16().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded = load_classifier(at(tmp_path), 2)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_the_shorter_of_the_models_and_the_tokenizers_limit_counts(
    tmp_path: Path, model: Path
) -> None:
    assert load_tokenizer(at(model), 32)
    with pytest.raises(ConfigError, match=r"must be at most 32, .* got 33"):
        load_tokenizer(at(model), 33)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"must be at most 20, .* got 21"):
        load_tokenizer(at(tmp_path), 21)


def test_the_end_of_text_pads_where_there_is_no_padding_token(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_tokenizer(tmp_path, pad_token=None, eos_token="[SEP]")
    assert load_tokenizer(at(tmp_path), 16).pad_token == "[SEP]"
    save_tokenizer(tmp_path, pad_token=None)
    with pytest.raises(ConfigError, match="got neither: add `pad_token`"):
        load_tokenizer(at(tmp_path), 16)


def test_a_model_without_a_classification_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timesformer"}))
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=f"the model of {tmp_path} could not be loaded"):
        load_classifier(at(tmp_path), 2)


def test_weights_are_held_in_the_type_that_is_asked_for(model: Path) -> None:
    loaded = load_classifier(at(model, dtype="bfloat16"), 2)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.name_or_path == str(model)


@pytest.mark.parametrize("key", ["path", "name", "package"])
def test_a_gguf_file_has_a_key_of_its_own(key: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"got the file a/b\.gguf\. Set `model\.{key}: a` and `model\.gguf_file: b\.g",
    ):
        ModelConfig(**{key: "a/b.gguf"})
    with pytest.raises(ConfigError, match=r"`model\.gguf_file` must be a \.gguf file, .*b\.bin"):
        ModelConfig(**{key: "a", "gguf_file": "b.bin"})
    assert ModelConfig(**{key: "a", "gguf_file": "b.gguf"})


def test_a_folder_with_a_gguf_file_alone_is_told_the_key(tmp_path: Path) -> None:
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"no config\.json\. .*set `model\.gguf_file: b\.gguf`"):
        at(tmp_path)


def test_files_that_lack_weights_are_refused_with_their_number(tmp_path: Path) -> None:
    save_model(tmp_path)
    drop_weights(tmp_path, "bert.encoder.layer.1.output", "classifier")
    with pytest.raises(
        ConfigError,
        match=r"could not be loaded: 4 of its 41 weights .* 'bert\.encoder\.layer\.1\.output",
    ):
        load_classifier(at(tmp_path), 2)


@pytest.mark.parametrize("values", [{"hidden_size": 32}, {"num_hidden_layers": 9}])
def test_a_configuration_of_another_model_is_refused(tmp_path: Path, values: Any) -> None:
    save_model(tmp_path)
    reconfigure(tmp_path, **values)
    with pytest.raises(
        ConfigError, match=r"1\d\d of its 153 weights|3\d of its 41 .*another model"
    ):
        load_classifier(at(tmp_path), 2)


def test_a_model_that_goes_on_with_texts_must_bring_its_output_layer(tmp_path: Path) -> None:
    bare_llama().save_pretrained(tmp_path)
    drop_weights(tmp_path, "lm_head")
    with pytest.raises(ConfigError, match=r"1 of its 21 weights .* 'lm_head\.weight'"):
        load_model(AutoModelForCausalLM, at(tmp_path))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_new_pooler_is_told_and_trained_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quantization: str | None
) -> None:
    save_model(tmp_path, hidden=64)
    drop_weights(tmp_path, "bert.pooler")
    loaded = load_classifier(at(tmp_path, quantization=quantization), 2)
    (note,) = [record.getMessage() for record in caplog.records if record.name[:7] == "dynlora"]
    assert note.startswith(f"the files of {tmp_path} have no weights for bert.pooler,")
    job = JobConfig(
        output="o",
        method="lora",
        model=ModelConfig(path=str(tmp_path), quantization=quantization),
        data=DataConfig(name="d"),
        lora=LoraSettings(r=2, target_modules=("dense",)),
    )
    model = add_adapter(loaded, job)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("bert.pooler.modules_to_save" in name for name in trained) == 2
    assert not any("pooler" in name and "lora" in name for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.tensor([[2, 5, 7, 3]])
    torch.manual_seed(99)
    again = load_classifier(at(tmp_path, quantization=quantization), 2)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        assert torch.allclose(again(input_ids=tokens).logits, expected, atol=1e-5)


def test_a_pooler_of_which_half_is_there_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    drop_weights(tmp_path, "bert.pooler.dense.bias")
    with pytest.raises(ConfigError, match=r"1 of its 41 weights .* 'bert\.pooler\.dense\.bias'"):
        load_classifier(at(tmp_path), 2)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_code_beside_a_model_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str | None
) -> None:
    save_model(tmp_path / "m")
    put_code_beside(tmp_path / "m", tmp_path / "ran")
    source = at(tmp_path / "m", quantization=quantization)
    loaders = (
        lambda: load_tokenizer(source, 8),
        lambda: load_classifier(source, 2),
        lambda: load_model(AutoModelForCausalLM, source),
    )
    for load in loaders:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        with pytest.raises(ConfigError, match=f"{tmp_path / 'm'} could not be loaded: "):
            load()
    assert not (tmp_path / "ran").exists()
