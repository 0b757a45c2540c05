"""Good files of every kind, and the one process in which changed ones are read."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.fuzz.limited_process import LimitedProcess
from tests.fuzz.reading import read
from tests.fuzz.targets import TARGETS, make_files


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a good file of every target."""
    return make_files(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="session")
def process(folder: Path) -> Iterator[LimitedProcess]:
    """Return the process, which has read every good file."""
    warm = [target.order(folder) for target in TARGETS.values()]
    with closing(LimitedProcess(read, *warm)) as started:
        yield started
