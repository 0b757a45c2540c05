"""A tokenizer of words and a tiny language model, shared by the tests of data and tasks."""

import pytest
from transformers import AutoTokenizer

from tests.jobs import save_tokenizer
from tests.language import save_language_model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Return the tokenizer of the tiny BERT; no test may change it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Return the folder of a tiny Llama and its tokenizer; no test may change it."""
    return save_language_model(tmp_path_factory.mktemp("language") / "model")
