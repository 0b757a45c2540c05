"""A tiny base model on disk."""

from pathlib import Path

import pytest

from tests.jobs import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny BERT and its tokenizer."""
    return save_model(tmp_path_factory.mktemp("tiny") / "model")
