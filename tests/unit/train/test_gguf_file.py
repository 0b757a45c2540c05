"""Models from GGUF files: read whole, or refused in one sentence."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynlora.errors import ConfigError
from dynlora.train.config import ModelConfig
from dynlora.train.pretrained import load_model, load_tokenizer, locate
from dynlora.train.source import locate
from tests.gguf_files import TOKENS, llama, save_bogus_gguf, save_gguf

LOADERS = (partial(load_tokenizer, max_length=16), partial(load_model, AutoModelForCausalLM))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama(), TOKENS)


def source_of(file):
    return locate(ModelConfig(path=str(file.parent), gguf_file=file.name))


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
