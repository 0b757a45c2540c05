"""Models from GGUF files: read whole, or refused in one sentence."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dynlora.errors import ConfigError
from dynlora.train.config import ModelConfig
from dynlora.train.pretrained import load_model, load_tokenizer, locate
from dynlora.train.source import locate
from tests.gguf_files import save_bogus_gguf, save_gguf

TOKENS = ["<|endoftext|>", "<bos>", "<pad>", *"abcdefghijkl", "ab"]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=False, eos_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama(), TOKENS)


@pytest.fixture
def source(file):
    return locate(ModelConfig(path=str(file.parent), gguf_file=file.name))


def test_a_gguf_file_gives_the_same_model_and_tokenizer(source, file, tmp_path):
    tokenizer = load_tokenizer(source, 16)
    loaded = load_model(AutoModelForCausalLM, source).eval()
    ids = tokenizer("abcl", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[15, 5, 14]]
    assert tokenizer.eos_token == "<|endoftext|>"
    assert loaded.name_or_path == str(file)
    with torch.no_grad():
        expected, found = llama()(ids).logits, loaded(ids).logits
    assert torch.allclose(expected, found, atol=1e-5)
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in llama().state_dict().items():
        assert torch.allclose(again.state_dict()[name], weight, atol=1e-6), name


def test_a_length_or_a_name_beyond_the_file_is_refused(source, file):
    with pytest.raises(ConfigError, match=r"at most 64, .*tiny\.gguf, got 65"):
        load_tokenizer(source, 65)
    with pytest.raises(
        ConfigError, match=rf"a file in {file.parent}, got 'big\.gguf'.* files are: tiny\.gguf"
    ):
        locate(ModelConfig(path=str(file.parent), gguf_file="big.gguf"))


@pytest.mark.parametrize("kept", [5, 500, 20000, -1])
def test_a_file_that_ends_too_early_is_refused(tmp_path, file, kept):
    (tmp_path / "m.gguf").write_bytes(file.read_bytes()[:kept])
    source = locate(ModelConfig(path=str(tmp_path), gguf_file="m.gguf"))
    for load in (partial(load_tokenizer, max_length=16), partial(load_model, AutoModelForCausalLM)):
        with pytest.raises(ConfigError, match=r"m\.gguf must be a whole GGUF file .* cut short"):
            load(source=source)


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("bogus", "ValueError: GGUF model with architecture bogus is not"),
        ("llama", r"m\.gguf must be a whole GGUF file"),  # without its keys
    ],
)
def test_a_file_that_transformers_cannot_use_is_refused(tmp_path, architecture, told):
    save_bogus_gguf(tmp_path / "m.gguf", architecture)
    source = locate(ModelConfig(path=str(tmp_path), gguf_file="m.gguf"))
    with pytest.raises(ConfigError, match=told):
        load_tokenizer(source, 16)
