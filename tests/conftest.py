"""What every test shares: fixed seeds, shapes checked at run time, models built in code.

No test reaches a network: sockets are blocked by pytest-socket, and the hub is told to stay offline
before anything imports it.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On some processors the last bits of MKL otherwise depend on memory alignment, so that tests that
# compare runs bit for bit would fail.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

from tests.typechecker import check_types

check_types()

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer  # noqa: F401  with all that it loads, before it is set aside

from tests.adapters import save_classifier_adapter
from tests.jobs import save_model
from tests.models import lora_llama

SHARED = Path(__file__).parent.parent.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests of minutes, which have their own time limits: none then ends alone."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(autouse=True, scope="session")
def set_aside() -> None:
    """Keep what the libraries hold out of each collection: Accelerate asks for one after a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Begin every test with the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def fused() -> Iterator[None]:
    """Fuse the forwards of models as small as those of tests, for which it does not pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynlora.fused.layers.LEAST_ELEMENTS", 0)
        yield


@pytest.fixture(autouse=True)
def unsized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print as into a pipe: processes that run tests side by side are told a terminal's width."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def tiny_llama() -> nn.Module:
    """Return a random Llama of hidden size 32 with LoRA of rank 4 on all 14 linear layers."""
    return lora_llama()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny BERT and its tokenizer."""
    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def saved_adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter of rank 4 on the tiny BERT; no test may change it."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_classifier_adapter(folder, model)
    return folder


@pytest.fixture
def adapter(saved_adapter: Path, tmp_path: Path) -> Path:
    """Return a copy of that adapter, which a test may change."""
    return shutil.copytree(saved_adapter, tmp_path / "adapter")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data sets that lies beside the repository; skip without it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data sets in {folder}, which are not on this machine")
    return folder
