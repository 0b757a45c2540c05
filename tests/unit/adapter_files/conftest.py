"""A tiny base model on disk, and an adapter of it."""

import shutil
from pathlib import Path

import pytest

from tests.adapters import save_classifier_adapter
from tests.jobs import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny BERT and its tokenizer."""
    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter of rank 4 on the tiny BERT, with a head of two labels."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_classifier_adapter(folder, model)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of that adapter, which a test may change."""
    return shutil.copytree(saved, tmp_path / "adapter")
