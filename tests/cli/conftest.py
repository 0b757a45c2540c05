"""Data, jobs, finished runs and runners of the command line, shared by the tests of the verbs."""

import json
import shutil
from functools import cache, partial
from pathlib import Path

import pytest

from dynlora.cli.main import main
from dynlora.importance.agreement import AgreementTest
from tests.cli.finished import finish
from tests.jobs import job_values, snapshot, write_data, write_job


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def job(tmp_path, model, data, output):
    return write_job(tmp_path / "job.yaml", job_values(model, data, output))


@pytest.fixture
def moving(monkeypatch):
    """Let every event move ranks: 12 steps are too few to show that progress is not chance."""
    monkeypatch.setattr(AgreementTest, "is_significant", lambda self: True)


@pytest.fixture
def train(job):
    """Return a runner of `dynlora train JOB` with more options; it returns the exit code."""
    return lambda *options: main(["train", str(job), *map(str, options)])


@pytest.fixture
def said(capsys):
    """Return a runner of a verb with `--json`; it returns what was printed."""

    def run(*arguments):
        capsys.readouterr()
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """Return a runner of a verb that must fail and write nothing; it returns its error line."""

    def run(*arguments):
        folders = {tmp_path, *(Path(a) for a in arguments if isinstance(a, Path) and a.is_dir())}
        before = {folder: snapshot(folder) for folder in folders}
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        (line,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
        assert captured.err.splitlines()[-1] == line
        assert captured.out == ""
        assert {folder: snapshot(folder) for folder in folders} == before
        return line.removeprefix("error: ")

    return run


@pytest.fixture
def error(refused, job):
    """Return a runner of the job, which must fail and write nothing; it returns the error line."""
    return partial(refused, "train", job)


@pytest.fixture(scope="session")
def finished_by(tmp_path_factory, model, data):
    """Return a function from a method to a finished run of it; no test may change the folder.

    The ranks of the dynamic one have moved.
    """

    @cache
    def make(method):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AgreementTest, "is_significant", lambda self: True)
            return finish(tmp_path_factory.mktemp(method), model, data, "--method", method)

    return make


@pytest.fixture(scope="session")
def finished(finished_by):
    """Return the folder of a finished dynamic run whose ranks moved; no test may change it."""
    return finished_by("dynamic")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")
