"""SIGTERM outside of training: a word, its exit code, and nothing half written."""

import os
import signal
from pathlib import Path

import pytest

from dynlora.cli.main import main


@pytest.fixture(autouse=True)
def usual_sigterm():
    """Let SIGTERM end the process, as it does where nobody listens."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)


def terminated(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_ends_a_verb_with_a_word_and_the_exit_code_that_shells_give(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dynlora.train.evaluation.evaluate_run", terminated)
    assert main(["eval", str(finished)]) == 143
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == "interrupted: before anything was written"


def test_it_leaves_no_half_of_a_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynlora.adapter_files.adapter.save_file", terminated)
    arguments = ["export", finished / "adapter", "--format", "native", "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 143
    assert list(tmp_path.iterdir()) == []
