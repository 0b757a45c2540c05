"""A tiny model, its data and a runner of the command line, shared by the tests of the verbs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dynlora.cli.main import main
from dynlora.importance.agreement import AgreementTest
from tests.jobs import job_values, save_model, write_data, write_job


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny BERT and its tokenizer."""
    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 48 training and 16 validation rows."""
    return write_data(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return the output folder of `job`; it is not there yet."""
    return tmp_path / "run"


@pytest.fixture
def job(tmp_path: Path, model: Path, data: Path, output: Path) -> Path:
    """Return the configuration file of a job of 12 steps."""
    return write_job(tmp_path / "job.yaml", job_values(model, data, output))


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every event move ranks: 12 steps are too few to show that progress is not chance."""
    monkeypatch.setattr(AgreementTest, "is_significant", lambda self: True)


@pytest.fixture
def train(job: Path) -> Callable[..., int]:
    """Return a runner of `dynlora train JOB` with more options; it returns the exit code."""

    def run(*options: object) -> int:
        return main(["train", str(job), *(str(option) for option in options)])

    return run
