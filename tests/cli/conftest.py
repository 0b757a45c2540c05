"""A tiny model, its data and a runner of the command line, shared by the tests of the verbs."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from dynlora.cli.main import main
from dynlora.importance.agreement import AgreementTest
from tests.adapters import save_classifier_adapter
from tests.cli.finished import finish
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


@pytest.fixture
def error(
    train: Callable[..., int], output: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a runner of a job that must fail; it returns the line after `error: `."""

    def run(*options: object) -> str:
        before = snapshot(output)
        capsys.readouterr()
        assert train(*options) == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert captured.err.splitlines()[-1] == errors[0]
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert snapshot(output) == before
        return errors[0].removeprefix("error: ")

    return run


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a runner of a verb that must fail and write nothing; it returns its error line."""

    def run(*arguments: object) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        (line,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
        assert captured.err.splitlines()[-1] == line
        assert captured.out == ""
        assert snapshot(tmp_path) == before
        return line

    return run


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


def snapshot(folder: Path) -> dict[str, bytes | None] | None:
    """Return everything in a folder; None if there is no folder."""
    if not folder.exists():
        return None
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="session")
def finished_by(
    tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path
) -> Callable[[str], Path]:
    """Return a function from a method to a finished run of it; no test may change the folder.

    The ranks of the dynamic one have moved.
    """

    @cache
    def make(method: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AgreementTest, "is_significant", lambda self: True)
            return finish(tmp_path_factory.mktemp(method), model, data, "--method", method)

    return make


@pytest.fixture(scope="session")
def finished(finished_by: Callable[[str], Path]) -> Path:
    """Return the folder of a finished dynamic run whose ranks moved; no test may change it."""
    return finished_by("dynamic")
